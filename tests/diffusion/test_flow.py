"""The linear flow: exact at its ends, inverse in its conversions, one meaning of guidance."""

from __future__ import annotations

import pytest
import torch

from diagonal.diffusion.flow import blend, by_frame, guided, to_clean
from tests.networks import draw

SHAPE = (2, 3, 4, 2, 2)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return draw(*SHAPE, seed=1, dtype=torch.float64), draw(*SHAPE, seed=2, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (2,), (2, 4)])
def test_level_zero_is_exactly_clean_and_level_one_exactly_noise(shape: tuple[int, ...]) -> None:
    clean, noise = pair()
    assert torch.equal(blend(clean, noise, torch.zeros(shape)), clean)
    assert torch.equal(blend(clean, noise, torch.ones(shape)), noise)
    assert torch.equal(blend(clean, noise, 0.0), clean) and torch.equal(blend(clean, noise, 1.0), noise)


def test_blending_is_linear_in_the_level() -> None:
    assert float(blend(torch.tensor(2.0), torch.tensor(10.0), 0.25)) == 0.75 * 2 + 0.25 * 10


def test_the_velocity_of_the_flow_leads_back_to_clean() -> None:
    clean, noise = pair()
    for level in (0.02, 0.357, 0.9375, 1.0):
        x, velocity = blend(clean, noise, level), noise - clean
        torch.testing.assert_close(to_clean(x, velocity, level), clean, rtol=0, atol=1e-14)


def test_at_level_zero_the_clean_prediction_is_the_input_whatever_the_velocity() -> None:
    clean, noise = pair()
    assert torch.equal(to_clean(clean, noise, torch.zeros(2, 4)), clean)


def test_a_level_by_sample_or_by_frame_reaches_its_own_latents() -> None:
    clean, noise = torch.zeros(SHAPE), torch.ones(SHAPE)
    by_sample = blend(clean, noise, torch.tensor([0.25, 0.5]))
    assert by_sample[0].unique().tolist() == [0.25] and by_sample[1].unique().tolist() == [0.5]
    levels = torch.arange(8).view(2, 4) / 8
    frames = blend(clean, noise, levels)
    assert all(frames[b, :, f].unique().tolist() == [float(levels[b, f])] for b in range(2) for f in range(4))
    assert by_frame(0.5) == 0.5


def test_guidance_always_weighs_the_difference_to_the_unconditional() -> None:
    conditional, unconditional = pair()
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional, rtol=0, atol=1e-15)
    paper = conditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 4.0), paper, rtol=0, atol=1e-14)
