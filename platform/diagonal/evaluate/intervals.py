"""Confidence of every figure, by SciPy: Wilson's for rates, the bootstrap for measures, Student's t over seeds.

Intervals hold 95 %; with `level` .9 each end alone is a one-sided bound of 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap
from scipy.stats import t as student_t

from diagonal.errors import require

LEVEL, ONE_SIDED = 0.95, 0.9
DRAWS, AT_ONCE = 1000, 50


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


def interval(values: Sequence[float], rate: bool = False, level: float = LEVEL) -> Interval:
    """Of the values' mean: Wilson's where they are hits (1) and misses (0), else the percentile bootstrap."""
    array = _array(values)
    if rate:
        return Interval(float(array.mean()), *_wilson(array, level), len(array))
    return Interval(float(array.mean()), *_bootstrap(array, level), len(array))


def difference(ours: Sequence[float], theirs: Sequence[float], rate: bool = False, level: float = LEVEL) -> Interval:
    """Of mean(ours - theirs) over the same clips: Newcombe's paired hybrid score interval for rates, which says
    nothing certain of a few clips that all agree; else the bootstrap of the clips' differences."""
    require(len(ours) == len(theirs), "ours", len(ours), f"as many values as theirs = {len(theirs)}")
    a, b = _array(ours), _array(theirs)
    if not rate:
        return interval(list(a - b), level=level)
    (low_a, high_a), (low_b, high_b) = _wilson(a, level), _wilson(b, level)
    p, q, together = float(a.mean()), float(b.mean()), _correlation(a, b)
    below = _hybrid(p - low_a, high_b - q, together)
    above = _hybrid(high_a - p, q - low_b, together)
    return Interval(p - q, p - q - below, p - q + above, len(a))


def over_seeds(by_seed: Sequence[Sequence[float]], rate: bool = False) -> Interval:
    """Of the mean over training seeds that were judged on the same clips: that of the clips, taken of each clip's mean
    over seeds (for rates as if that were one draw, which is too wide rather than too narrow), and Student's t of the
    seeds' means, added as independent errors. One seed says nothing of others: its interval is that of its clips."""
    clips = np.mean([_array(values) for values in by_seed], axis=0)
    return _widened(interval(list(clips), rate), [float(np.mean(values)) for values in by_seed], LEVEL)


def difference_over_seeds(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], rate: bool = False, level: float = LEVEL
) -> Interval:
    """`over_seeds` of the differences to other values of the same clips, by seed; `theirs` may be of one for all."""
    pairs = list(zip(ours, theirs if len(theirs) > 1 else [theirs[0]] * len(ours), strict=True))
    a, b = (np.mean([_array(pair[side]) for pair in pairs], axis=0) for side in (0, 1))
    return _widened(
        difference(list(a), list(b), rate, level), [float(np.mean(x) - np.mean(y)) for x, y in pairs], level
    )


def _widened(clips: Interval, means: Sequence[float], level: float) -> Interval:
    """The interval of the clips with that of the seeds' means added in squares."""
    count = len(means)
    if count < 2:
        return clips
    half = float(student_t.ppf((1 + level) / 2, count - 1)) * float(np.std(means, ddof=1)) / math.sqrt(count)
    return Interval(
        clips.mean,
        clips.mean - math.hypot(clips.mean - clips.low, half),
        clips.mean + math.hypot(clips.high - clips.mean, half),
        clips.count,
    )


def _array(values: Sequence[float]) -> NDArray[np.float64]:
    require(len(values) > 0, "values", list(values), "at least one value")
    return np.asarray(values, np.float64)


def _wilson(hits: NDArray[np.float64], level: float) -> tuple[float, float]:
    found = binomtest(round(hits.sum()), len(hits)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def _bootstrap(values: NDArray[np.float64], level: float, seed: int = 0) -> tuple[float, float]:
    if len(values) < 2:
        return math.nan, math.nan
    options = {"n_resamples": DRAWS, "batch": AT_ONCE, "method": "percentile", "rng": np.random.default_rng(seed)}
    found = bootstrap((values,), np.mean, confidence_level=level, **options).confidence_interval
    return float(found.low), float(found.high)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread > 0 else 0.0


def _hybrid(one: float, other: float, together: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * together * one * other + other * other))
