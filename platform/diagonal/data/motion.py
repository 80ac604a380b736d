"""Motion read from where an object was seen: direction, pace and smoothness of a track, whatever world it is in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diagonal.data.world import DIRECTIONS, WorldConfig

Track = NDArray[np.float64]  # places of the object, [n 2] in pixels (x, y), or one coordinate of them, [n]
Times = NDArray[np.float64]  # pixel frames in which the object was seen, [n]
Speeds = Mapping[str, float]  # pixels a pixel frame by the caption's words

SMOOTHING_FRAMES = 5
STRIDE_FRAMES = 4  # pixel frames of a latent frame: over whole ones, the blur within each does not show
LEG_PX = 2.5  # an excursion this long (at 32 px) is a leg, a shorter one may be jitter
STANDSTILL_SHARE = 0.5  # of the slowest speed: below it nothing moves


def read_box(places: Track, times: Times, config: WorldConfig, speeds: Speeds) -> tuple[str | None, str | None]:
    """Direction and speed of an object that bounces: by its first leg, and by the pace between its turns."""
    smoothed = moving_mean(places)
    axis = int(np.ptp(smoothed, axis=0).argmax())
    speed = nearest_speed(pace(places[:, axis], times), speeds)
    if speed is None:
        return None, None
    sign = _first_swing(smoothed[:, axis], LEG_PX * config.scale)
    heading = tuple(sign if one == axis else 0 for one in (0, 1))
    return next((name for name, known in DIRECTIONS.items() if known == heading), None), speed


def pace(track: Track, times: Times) -> float:
    """Upper quartile of the speed over a few frames, in pixels a frame: most of a leg shows it, windows across a turn
    show less."""
    span = min(STRIDE_FRAMES, len(track) - 1)
    return float(np.quantile(np.abs(track[span:] - track[:-span]) / (times[span:] - times[:-span]), 0.75))


def _first_swing(track: Track, least_px: float) -> int:
    """Sign of the first excursion of `least_px`, or of half the track's range where that is less; 0 if it is flat."""
    least_px = max(min(least_px, float(np.ptp(track)) / 2), 1e-6)
    rises = np.flatnonzero(track - np.minimum.accumulate(track) >= least_px)
    falls = np.flatnonzero(np.maximum.accumulate(track) - track >= least_px)
    first_rise = rises[0] if len(rises) else len(track)
    first_fall = falls[0] if len(falls) else len(track)
    return int(np.sign(first_fall - first_rise))


def moving_mean(values: NDArray) -> NDArray:
    """Mean over a window of up to SMOOTHING_FRAMES frames that stays centred, so that it narrows at the ends."""
    count = len(values)
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    index = np.arange(count)
    wing = np.minimum(np.minimum(index, count - 1 - index), SMOOTHING_FRAMES // 2)
    return (sums[index + wing + 1] - sums[index - wing]) / (2 * wing + 1)[:, None]


def nearest_speed(pace_px: float, speeds: Speeds) -> str | None:
    """The caption's word for a pace in pixels a frame; None for a standstill."""
    if pace_px < STANDSTILL_SHARE * min(speeds.values()):
        return None
    return min(speeds, key=lambda name: abs(speeds[name] - pace_px))


def smoothness(places: Track, times: Times, span: int, config: WorldConfig) -> float:
    """1 / (1 + jitter); jitter is the mean departure of the velocity over `span` frames from its own mean.

    In pixels a frame at 32 px. Where the shape bounces, the velocity along its axis counts without its sign.
    """
    if len(times) <= span:
        return 1.0
    steps = places[span:] - places[:-span]
    if config.edge == "wrap":
        steps = (steps + config.size_px / 2) % config.size_px - config.size_px / 2
    velocity = steps / (times[span:] - times[:-span])[:, None]
    if config.edge == "bounce":
        axis = int(np.ptp(places, axis=0).argmax())
        velocity[:, axis] = np.abs(velocity[:, axis])
    residual = velocity - velocity.mean(0)
    return float(1 / (1 + np.linalg.norm(residual, axis=1).mean() / config.scale))
