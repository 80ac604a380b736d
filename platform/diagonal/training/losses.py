"""Losses of every training stage as pure functions: tensors in, one scalar out, in float32; latents are `b c f h w`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diagonal.config.training import LossConfig
from diagonal.schedule import warp

SMALLEST_NORMALISER = 1e-8


def score_level(u: Tensor, shift: float, low: float = 0.02, high: float = 0.98) -> Tensor:
    """Noise level of the score, `clamp(shift*u / (1 + (shift-1)*u), low, high)`, for uniform `u` in [0, 1] `[b]`.

    One level a sample, the same for all its frames, independent of the rollout's exit steps.
    """
    level: Tensor = warp(u.float(), shift)  # type: ignore[arg-type, assignment]  # plain arithmetic, tensors pass
    return level.clamp(low, high)


def frame_difference(x: Tensor) -> Tensor:
    """D: difference of adjacent latent frames, `x[f+1] - x[f]`; `[b, c, f, h, w]` to `[b, c, f-1, h, w]`."""
    return x[:, :, 1:] - x[:, :, :-1]


def dmd(x: Tensor, fake_clean: Tensor, real_clean: Tensor) -> Tensor:
    """Distribution matching: `0.5*mean (x - sg(x - g))^2`, `g = (f - r)/mean|x - r|`; its gradient is `g/N`.

    x: the rollout; f: the critic's clean prediction; r: the guided teacher's. The inner mean is by sample.
    """
    return _pull(x.float(), _direction(x.float(), fake_clean.float(), real_clean.float())).mean()


def motion(x: Tensor, fake_clean: Tensor, real_clean: Tensor, frame_weights: Tensor | None = None) -> Tensor:
    """`dmd` on adjacent-frame differences: `0.5*mean (Dx - sg(Dx - (Df - Dr)/mean|Dx - Dr|))^2`.

    `frame_weights` `[b, f-1]` multiplies each difference's square (1 by default; see `motion_frame_weights`).
    """
    difference, direction = _motion_direction(x, fake_clean, real_clean)
    pull = _pull(difference, direction)
    if frame_weights is not None:
        pull = pull * frame_weights.detach().float()[:, None, :, None, None]
    return pull.mean()


def motion_frame_weights(
    x: Tensor, fake_clean: Tensor, real_clean: Tensor, dynamic: float = 0.7, growth: float = 1.2
) -> Tensor:
    """The published code's weights of the frame differences `[b, f-1]`, detached: later differences weigh more.

    `dynamic*(1 + cumsum_j(e)/sum(e)) + (1 - dynamic)*growth^j/mean(growth^j)`, `e_j = mean_chw (g_j - x_{j+1})^2`,
    g as in `motion`.
    """
    _, direction = _motion_direction(x.detach(), fake_clean, real_clean)
    error = (direction - x.detach().float()[:, :, 1:]).square().mean(dim=(1, 3, 4))
    share = error.cumsum(1) / error.sum(1, keepdim=True).clamp_min(SMALLEST_NORMALISER)
    exponential = growth ** torch.arange(error.shape[1], device=x.device, dtype=torch.float32)
    return dynamic * (1.0 + share) + (1.0 - dynamic) * exponential / exponential.mean()


def regression(x: Tensor, reference: Tensor) -> Tensor:
    """`mean (x - sg(x_ref))^2` of the rollout and the reference rollout."""
    return (x.float() - reference.detach().float()).square().mean()


def flow_regression(x: Tensor, reference: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`mean (F(Dx) - sg(F(Dx_ref)))^2`.

    F is the identity, and training uses no other: the published code's head is in no optimizer, so it stays the
    identity that it is initialised to. `features` may be a head that some optimizer does train.
    """
    extract = features or torch.nn.Identity()
    with torch.no_grad():
        target = extract(frame_difference(reference.float()))
    return (extract(frame_difference(x.float())).float() - target.float()).square().mean()


def ode_regression(prediction: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """`mean_b mean_kept (x0_prediction - x0)^2`: of each sample over the frames where boolean `keep` `[b, f]`, then of
    the samples; a sample that keeps none counts 0.

    A chunk whose level is 0 is its own answer and is not kept. By sample, so that the loss of a batch is the same
    however it is cut over micro-batches and ranks.
    """
    mask = keep.bool()[:, None, :, None, None].expand(prediction.shape)
    error = torch.where(mask, prediction.float() - target.detach().float(), 0.0).square()
    return (error.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)).mean()


def critic_flow(velocity_prediction: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
    """Flow matching of the critic on rollouts: `mean (v - sg(noise - clean))^2`."""
    velocity = (noise.float() - clean.float()).detach()
    return (velocity_prediction.float() - velocity).square().mean()


def generator_total(
    weights: LossConfig,
    *,
    dmd: Tensor,
    motion: Tensor | float = 0.0,
    flow_regression: Tensor | float = 0.0,
    regression: Tensor | float = 0.0,
) -> Tensor:
    """`spatial*dmd + regression*reg + gamma*(motion*motion_dmd + flow_regression)`, each term times its weight.

    Terms left out count 0. `gamma` is the paper's flow-loss weight (its Fig. 5b sweeps it over [0, 2]).
    """
    flow = weights.motion * motion + weights.flow_regression * flow_regression
    return weights.spatial * dmd + weights.regression * regression + weights.gamma * flow


def _direction(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """`(fake - real)/mean|x - real|`, detached, the mean by sample."""
    x, fake, real = x.detach(), fake.detach(), real.detach()
    normaliser = (x - real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return (fake - real) / normaliser.clamp_min(SMALLEST_NORMALISER)


def _motion_direction(x: Tensor, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    difference = frame_difference(x.float())
    fake_difference, real_difference = frame_difference(fake.float()), frame_difference(real.float())
    return difference, _direction(difference, fake_difference, real_difference)


def _pull(x: Tensor, direction: Tensor) -> Tensor:
    """`0.5*(x - sg(x - direction))^2`, written so that its gradient is `direction` with no rounding."""
    return 0.5 * (x - x.detach() + direction).square()
