"""Confidence of every figure, 95 %: Wilson's for rates, the bootstrap for measures, Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagonal.errors import require

Z = 1.96
DRAWS, AT_ONCE = 1000, 50
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them the normal one.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values and its 95 % interval; `low` and `high` are NaN where the values are too few to say."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def to_dict(self) -> dict[str, Any]:
        """Rounded, for JSON: NaN becomes null."""
        values = {"mean": self.mean, "low": self.low, "high": self.high, "half_width": self.half_width}
        return {**{k: round(v, 6) if math.isfinite(v) else None for k, v in values.items()}, "count": self.count}


def interval(values: Sequence[float], rate: bool = False) -> Interval:
    """Of the values' mean: Wilson's where they are hits (1) and misses (0), else the percentile bootstrap."""
    array = _array(values)
    if rate:
        return Interval(float(array.mean()), *_wilson(array), len(array))
    return Interval(float(array.mean()), *_bootstrap(array), len(array))


def difference(ours: Sequence[float], theirs: Sequence[float], rate: bool = False) -> Interval:
    """Of mean(ours - theirs) over the same clips: Newcombe's paired hybrid score interval for rates, which says
    nothing certain of a few clips that all agree; else the bootstrap of the clips' differences."""
    require(len(ours) == len(theirs), "ours", len(ours), f"as many values as theirs = {len(theirs)}")
    a, b = _array(ours), _array(theirs)
    if not rate:
        return interval(list(a - b))
    (low_a, high_a), (low_b, high_b) = _wilson(a), _wilson(b)
    p, q, together = float(a.mean()), float(b.mean()), _correlation(a, b)
    below = _hybrid(p - low_a, high_b - q, together)
    above = _hybrid(high_a - p, q - low_b, together)
    return Interval(p - q, p - q - below, p - q + above, len(a))


def over_seeds(means: Sequence[float]) -> Interval:
    """Of the mean over training seeds, each counted once: Student's t; one seed says nothing of the others."""
    array = _array(means)
    if len(array) < 2:
        return Interval(float(array.mean()), math.nan, math.nan, len(array))
    half = _t(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(float(array.mean()), float(array.mean()) - half, float(array.mean()) + half, len(array))


def _t(freedom: int) -> float:
    return _T[freedom - 1] if freedom <= len(_T) else Z


def _array(values: Sequence[float]) -> NDArray[np.float64]:
    require(len(values) > 0, "values", list(values), "at least one value")
    return np.asarray(values, np.float64)


def _wilson(hits: NDArray[np.float64]) -> tuple[float, float]:
    count, rate = len(hits), float(hits.mean())
    centre = rate + Z * Z / (2 * count)
    half = Z * math.sqrt(rate * (1 - rate) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _bootstrap(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    if len(values) < 2:
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    rounds = [values[draw.integers(len(values), size=(AT_ONCE, len(values)))].mean(1) for _ in range(DRAWS // AT_ONCE)]
    low, high = np.quantile(np.concatenate(rounds), (0.025, 0.975))
    return float(low), float(high)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread > 0 else 0.0


def _hybrid(one: float, other: float, together: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * together * one * other + other * other))
