"""The guided bidirectional teacher: its clean prediction, and the trajectory of its probability-flow ODE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from diagonal.diffusion.flow import guided, to_clean
from diagonal.errors import require
from diagonal.model.dit import timestep
from diagonal.schedule import RAW_TIMESTEPS, raw_level, warp


@dataclass(frozen=True)
class Trajectory:
    """States of one guided ODE solution: `states` `[s, c, f, h, w]` at falling `levels` (first 1, last 0)."""

    states: Tensor
    levels: tuple[float, ...]
    prompt: str
    seed: int


def velocity(network: WanTransformer3DModel, latents: Tensor, level: Tensor, text: Tensor) -> Tensor:
    """Velocity `[b, c, f, h, w]` in float32 of diffusers' own network at one level `[b]` a sample."""
    return network(latents.to(network.dtype), timestep(level), text.to(network.dtype)).sample.float()


def guided_velocity(
    network: WanTransformer3DModel, latents: Tensor, level: Tensor, text: Tensor, negative: Tensor, weight: float
) -> Tensor:
    """Velocity under guidance `negative + weight*(text - negative)`, both branches in one batch."""
    if weight == 1.0:
        return velocity(network, latents, level, text)
    both = velocity(network, latents.repeat(2, 1, 1, 1, 1), level.repeat(2), torch.cat((text, negative)))
    conditional, unconditional = both.chunk(2)
    return guided(conditional, unconditional, weight)


def guided_clean(
    network: WanTransformer3DModel, latents: Tensor, level: Tensor, text: Tensor, negative: Tensor, weight: float
) -> Tensor:
    """Clean prediction `[b, c, f, h, w]` under guidance (guiding the velocity or the clean sample is the same)."""
    return to_clean(latents, guided_velocity(network, latents, level, text, negative, weight), level)


def solver_levels(steps: int, shift: float) -> tuple[float, ...]:
    """The Euler grid: `steps + 1` levels, uniform in raw time and warped, from 1 to 0."""
    require(steps >= 1, "solver_steps", steps, "a whole number of at least 1")
    return tuple(warp((steps - index) / steps, shift) for index in range(steps + 1))


@torch.no_grad()
def solve(
    network: WanTransformer3DModel,
    noise: Tensor,
    text: Tensor,
    negative: Tensor,
    *,
    weight: float,
    steps: int,
    shift: float,
    kept_raw: Sequence[int] = (1000, 0),
) -> tuple[Tensor, tuple[float, ...]]:
    """Euler solution of the guided ODE from noise `[b, c, f, h, w]`.

    Returns the states at the raw timesteps `kept_raw`, `[b, s, c, f, h, w]`, and their levels. Every kept timestep
    must lie on the grid: a multiple of 1000/steps.
    """
    grid = solver_levels(steps, shift)
    wanted = [_grid_index(raw, steps) for raw in kept_raw]
    latents, states = noise, {0: noise}
    for index, (level, following) in enumerate(zip(grid, grid[1:], strict=False)):
        batch_level = torch.full((len(latents),), level, device=latents.device)
        slope = guided_velocity(network, latents, batch_level, text, negative, weight)
        latents = latents + (following - level) * slope
        if index + 1 in wanted:
            states[index + 1] = latents
    return torch.stack([states[index] for index in wanted], dim=1), tuple(raw_level(raw, shift) for raw in kept_raw)


def _grid_index(raw: int, steps: int) -> int:
    allowed = f"a multiple of {RAW_TIMESTEPS / steps:g} (solver_steps = {steps}), 0 to {RAW_TIMESTEPS}"
    require(0 <= raw <= RAW_TIMESTEPS and (RAW_TIMESTEPS - raw) * steps % RAW_TIMESTEPS == 0, "kept_raw", raw, allowed)
    return (RAW_TIMESTEPS - raw) * steps // RAW_TIMESTEPS
