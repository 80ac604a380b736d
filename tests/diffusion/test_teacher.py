"""The guided teacher: its guidance, its grid, and the states of its ODE that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion import teacher
from diagonal.diffusion.flow import to_clean
from diagonal.diffusion.teacher import guided_clean, guided_velocity, solve, solver_levels, velocity
from diagonal.errors import FieldError
from diagonal.schedule import raw_level
from tests.networks import TEXT_DIM, TEXT_TOKENS, draw, small_config, small_wan

KEPT = Config.from_preset("wan-1.3b").pairs.kept_raw
SHAPE = small_config().geometry.frames_shape(6, 2)


@pytest.fixture(scope="module")
def network() -> Any:
    return small_wan().requires_grad_(False)


def texts() -> tuple[Tensor, Tensor]:
    return draw(2, TEXT_TOKENS, TEXT_DIM, seed=1), draw(2, TEXT_TOKENS, TEXT_DIM, seed=2)


def solved(
    network: Any, steps: int, kept_raw: tuple[int, ...], weight: float = 3.0
) -> tuple[Tensor, tuple[float, ...]]:
    noise, (text, negative) = draw(*SHAPE, seed=5), texts()
    return solve(network, noise, text, negative, weight=weight, steps=steps, shift=5.0, kept_raw=kept_raw)


@pytest.mark.parametrize("steps", [1, 20, 40])
def test_the_grid_is_uniform_in_raw_time_and_warped(steps: int) -> None:
    grid = solver_levels(steps, 5.0)
    assert len(grid) == steps + 1 and (grid[0], grid[-1]) == (1.0, 0.0)
    assert all(high > low for high, low in zip(grid, grid[1:], strict=False))
    expected = [raw_level(1000 * (steps - index) // steps, 5.0) for index in range(steps + 1)]
    assert grid == pytest.approx(expected, abs=1e-12)


def test_guidance_is_the_unconditional_plus_the_weighed_difference(network: Any) -> None:
    x, level, (text, negative) = draw(*SHAPE), torch.tensor([0.9, 0.4]), texts()
    conditional, unconditional = (velocity(network, x, level, t) for t in (text, negative))
    for weight in (0.0, 1.0, 4.0):
        found = guided_velocity(network, x, level, text, negative, weight)
        expected = unconditional + weight * (conditional - unconditional)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 1e-3


def test_guiding_the_velocity_is_guiding_the_clean_prediction(network: Any) -> None:
    x, level, (text, negative) = draw(*SHAPE), torch.tensor([0.9, 0.4]), texts()
    conditional, unconditional = (to_clean(x, velocity(network, x, level, t), level) for t in (text, negative))
    found = guided_clean(network, x, level, text, negative, 6.0)
    torch.testing.assert_close(found, unconditional + 6.0 * (conditional - unconditional), rtol=0, atol=2e-5)


def test_a_weight_of_one_spends_no_second_branch(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = teacher.velocity

    def count(net: Any, x: Tensor, level: Tensor, text: Tensor) -> Tensor:
        rows.append(len(x))
        return plain(net, x, level, text)

    monkeypatch.setattr(teacher, "velocity", count)
    solved(network, 2, (1000, 0), weight=1.0)
    solved(network, 2, (1000, 0), weight=2.0)
    assert rows == [2, 2, 4, 4]


@pytest.mark.parametrize("steps", [20, 40])
def test_the_first_kept_state_is_the_noise_and_the_last_the_endpoint(network: Any, steps: int) -> None:
    states, levels = solved(network, steps, KEPT)
    assert states.shape == (2, len(KEPT), *SHAPE[1:])
    assert torch.equal(states[:, 0], draw(*SHAPE, seed=5))
    assert levels == tuple(raw_level(raw, 5.0) for raw in KEPT) and (levels[0], levels[-1]) == (1.0, 0.0)
    endpoint, _ = solved(network, steps, (1000, 0))
    assert torch.equal(states[:, -1], endpoint[:, -1])


def test_euler_from_a_kept_state_lands_on_the_next(network: Any) -> None:
    steps = 20
    states, levels = solved(network, steps, KEPT)
    grid, (text, negative) = solver_levels(steps, 5.0), texts()
    for place, (raw, following) in enumerate(zip(KEPT, KEPT[1:], strict=False)):
        x = states[:, place]
        first, last = (steps - steps * raw // 1000, steps - steps * following // 1000)
        for index in range(first, last):
            level = torch.full((2,), grid[index])
            x = x + (grid[index + 1] - grid[index]) * guided_velocity(network, x, level, text, negative, 3.0)
        assert torch.equal(x, states[:, place + 1])
        assert levels[place + 1] == pytest.approx(grid[last], abs=1e-12)


def test_one_euler_step_of_a_straight_flow_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the velocity is the constant noise - clean, every number of steps ends at clean."""
    noise, clean = draw(*SHAPE, seed=5), draw(*SHAPE, seed=6)
    monkeypatch.setattr(teacher, "velocity", lambda net, x, level, text: noise - clean)
    for steps in (1, 20):
        states, _ = solved(None, steps, (1000, 0), weight=1.0)
        torch.testing.assert_close(states[:, -1], clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "raw"), [(20, 725), (20, 999), (10, 750), (20, 1050), (20, -50)])
def test_a_kept_timestep_off_the_grid_is_refused_before_anything_is_solved(steps: int, raw: int) -> None:
    with pytest.raises(FieldError, match=f"kept_raw = {raw}: allowed is a multiple of {1000 // steps}"):
        solved(None, steps, (1000, raw, 0))


def test_every_kept_timestep_lies_on_the_grid_of_20_and_of_40_steps() -> None:
    assert KEPT == (1000, 750, 500, 250, 100, 0)
    for steps in (20, 40, 60):
        assert [teacher._grid_index(raw, steps) for raw in KEPT] == [steps - steps * raw // 1000 for raw in KEPT]


def test_no_steps_are_refused() -> None:
    with pytest.raises(FieldError, match="solver_steps = 0"):
        solver_levels(0, 5.0)


def test_level_0_9375_reaches_the_teacher_as_timestep_937_5_in_float32() -> None:
    network, seen = small_wan().to(torch.bfloat16), []
    network.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    text, _ = texts()
    with torch.no_grad():
        found = velocity(network, draw(*SHAPE), torch.tensor([0.9375, 0.625]), text)
    assert seen[0].tolist() == [937.5, 625.0] and seen[0].dtype == found.dtype == torch.float32
