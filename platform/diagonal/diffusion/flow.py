"""The linear flow: blending with noise, and velocity to and from the clean sample; in float32."""

from __future__ import annotations

from torch import Tensor


def blend(clean: Tensor, noise: Tensor, level: Tensor | float) -> Tensor:
    """`x = (1 - level)*clean + level*noise`; level 0 is exactly clean, level 1 exactly noise."""
    level = by_frame(level)
    return (1.0 - level) * clean + level * noise


def to_clean(x: Tensor, velocity: Tensor, level: Tensor | float) -> Tensor:
    """Clean sample that a velocity predicts: `x - level*velocity`, with velocity = noise - clean."""
    return x - by_frame(level) * velocity


def guided(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance, always `unconditional + weight*(conditional - unconditional)`."""
    return unconditional + weight * (conditional - unconditional)


def by_frame(level: Tensor | float) -> Tensor | float:
    """A level by sample `[b]` or by frame `[b, f]`, shaped to multiply latents `[b, c, f, h, w]`; numbers pass."""
    if not isinstance(level, Tensor) or level.ndim == 0:
        return level
    return level.view(-1, 1, 1, 1, 1) if level.ndim == 1 else level[:, None, :, None, None]
