"""How far a long stream drifted from its first chunks, by measures of its pictures; and when to anchor it anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diagonal.config import ServeConfig
from diagonal.errors import require
from diagonal.media.measures import Pixels, brightness, motion_amplitude, saturation, sharpness

MEASURES: Mapping[str, Callable[[Pixels], float]] = {
    "saturation": saturation,
    "sharpness": sharpness,
    "brightness": brightness,
    "motion": motion_amplitude,
}
PICTURE = ("saturation", "sharpness", "brightness")  # motion comes and goes with the scene: reported, never acted upon
REFERENCE_CHUNKS = 4
_SMOOTHING = 0.25
_LEAST = 1e-3  # below it a measure is nothing to compare with
_SAMPLED_ROWS = 60  # pictures are measured on a grid of about so many rows: 832x480 in 2 ms a chunk


@dataclass
class DriftMonitor:
    """Means of the first `REFERENCE_CHUNKS` chunks, and smoothed means of the chunks since."""

    chunks: int = 0
    reference: dict[str, float] = field(default_factory=dict)
    smoothed: dict[str, float] = field(default_factory=dict)

    def observe(self, pixels: Pixels) -> dict[str, float]:
        """Take in a chunk `[f, h, w, 3]` uint8; each measure over its reference, {} while that is being learnt.

        No picture says nothing.
        """
        if not len(pixels):
            return {}
        stride = max(1, pixels.shape[1] // _SAMPLED_ROWS)
        found = {name: of(pixels[:, ::stride, ::stride]) for name, of in MEASURES.items()}
        self.chunks += 1
        if self.chunks <= REFERENCE_CHUNKS:
            weight = 1.0 / self.chunks
            self.reference = {name: _towards(self.reference.get(name, 0.0), found[name], weight) for name in found}
            self.smoothed = dict(self.reference)
            return {}
        self.smoothed = {name: _towards(self.smoothed[name], found[name], _SMOOTHING) for name in found}
        return self.ratios

    @property
    def ratios(self) -> dict[str, float]:
        """Each smoothed measure over its reference: 1 is none, 1.3 is 30 % more; {} while that is being learnt."""
        if self.chunks <= REFERENCE_CHUNKS:
            return {}
        return {name: max(self.smoothed[name], _LEAST) / max(self.reference[name], _LEAST) for name in self.smoothed}

    @property
    def drift(self) -> float:
        """The largest change of a measure of the picture, as a share: 0.3 is 30 % more or less."""
        ratios = self.ratios
        return max((max(ratios[name], 1.0 / ratios[name]) - 1.0 for name in PICTURE if name in ratios), default=0.0)

    def restart(self) -> None:
        """Learn the reference anew: what is shown was changed on purpose."""
        self.chunks, self.reference, self.smoothed = 0, {}, {}

    def to_dict(self) -> dict[str, Any]:
        return {"chunks": self.chunks, "reference": dict(self.reference), "smoothed": dict(self.smoothed)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DriftMonitor:
        """What `to_dict` gave; `FieldError` on anything else."""
        known = set(data) == {"chunks", "reference", "smoothed"} and isinstance(data["chunks"], int)
        require(known, "drift", sorted(data), "chunks, reference and smoothed")
        parts = [{name: float(data[part][name]) for name in data[part]} for part in ("reference", "smoothed")]
        require(all(set(part) <= set(MEASURES) for part in parts), "drift", sorted(parts[0]), f"of {sorted(MEASURES)}")
        return cls(data["chunks"], *parts)


@dataclass(frozen=True)
class ReanchorPolicy:
    """When a stream's cache is written anew from its sink and newest chunk alone; 0 is never."""

    drift: float = 0.0
    every_chunks: int = 0
    rest_chunks: int = 4

    @classmethod
    def of(cls, serve: ServeConfig, window_chunks: int) -> ReanchorPolicy:
        """As configured; after one by drift, the window fills before the next."""
        return cls(serve.reanchor_drift, serve.reanchor_every_chunks, window_chunks)

    def decided(self, next_chunk: int, last: int) -> bool:
        """Whether `cause` is None before that chunk, whatever the pictures before it will be."""
        return not self.drift and not (self.every_chunks and next_chunk - last >= self.every_chunks)

    def cause(self, monitor: DriftMonitor, next_chunk: int, last: int) -> str | None:
        """Why the stream is to be anchored anew before `next_chunk` (`last` is where it was before), None if not."""
        if self.every_chunks and next_chunk - last >= self.every_chunks:
            return "interval"
        if self.drift and monitor.drift > self.drift and next_chunk - last >= self.rest_chunks:
            return "drift"
        return None


def _towards(start: float, end: float, weight: float) -> float:
    return start + weight * (end - start)
