"""Distance of two sets of clips in the features of a fixed small network, whose weights are drawn from a seed.

Its numbers mean nothing beside those of trained networks (FVD); they rank sets of clips of one world.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diagonal.diffusion.noise import Salt, generator
from diagonal.errors import require

SIDE_PX = 32
WIDTHS = (3, 16, 16, 16)
FEATURES = 2 * WIDTHS[-1]
_CLIPS_AT_ONCE = 8


@torch.no_grad()
def clip_features(pixels: Tensor) -> Tensor:
    """`[b, FEATURES]` of clips `[b, f, h, w, 3]` uint8: mean and spread in space and time of three strided random 3-D
    convolutions' responses; the spread in time sees motion."""
    require(pixels.ndim == 5 and pixels.shape[1] >= 2, "clips", tuple(pixels.shape), "[b, f, h, w, 3] with f >= 2")
    return torch.cat([_features(part) for part in pixels.cpu().split(_CLIPS_AT_ONCE)])


def _features(pixels: Tensor) -> Tensor:
    hidden = pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    hidden = F.interpolate(hidden, size=(hidden.shape[2], SIDE_PX, SIDE_PX), mode="area")
    for layer, (inner, outer) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        weight = (
            torch.randn(outer, inner, 3, 3, 3, generator=generator(Salt.FEATURES, layer)) * (2 / (27 * inner)) ** 0.5
        )
        hidden = F.leaky_relu(F.conv3d(hidden, weight, stride=2, padding=1), 0.1)
    return torch.cat((hidden.mean((2, 3, 4)), hidden.std(2, correction=0).mean((2, 3))), dim=1)


def frechet(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Frechet distance of normal distributions fitted to features `[n, d]`:
    `|m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)`; 0 for equal sets, and biased upwards for few clips."""
    require(min(len(ours), len(theirs)) > 1, "clips", min(len(ours), len(theirs)), "at least 2 clips a set")
    (mean, spread), (other, wider) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (ours, theirs))
    root = _root(spread)
    crossed = np.trace(_root(root @ wider @ root))
    return max(0.0, float(np.square(mean - other).sum() + np.trace(spread) + np.trace(wider) - 2 * crossed))


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
