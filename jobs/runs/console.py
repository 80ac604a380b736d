"""Times for people, whether it is time again, and how far a loop in one process has come."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

PROGRESS_EVERY_S = 10.0


@dataclass
class Interval:
    """Whether it is time again."""

    every_s: float
    last_s: float = field(default_factory=lambda: time.monotonic())

    def is_due(self) -> bool:
        now_s = time.monotonic()
        if now_s - self.last_s < self.every_s:
            return False
        self.last_s = now_s
        return True


def duration(seconds: float) -> str:
    """A time in the largest fitting unit: 42 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, size in ((120.0, "s", 1.0), (7200.0, "min", 60.0), (172800.0, "h", 3600.0)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if unit != "h" else f"{seconds / size:.1f} h"
    return f"{seconds / 86400.0:.1f} days"


class Progress:
    """Prints the newest losses and the time left, now and then; `done` updates were made before."""

    def __init__(self, stage: str, updates: int, done: int = 0) -> None:
        self._stage, self._updates, self._done = stage, updates, done
        self._started_s = time.monotonic()
        self._clock = Interval(PROGRESS_EVERY_S)

    def __call__(self, update: int, figures: Mapping[str, float]) -> None:
        if self._clock.is_due() or update == self._updates:
            left_s = (self._updates - update) * (time.monotonic() - self._started_s) / (update - self._done)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"{self._stage}: update {update}/{self._updates}, {shown}, about {left_s:.0f} s left", flush=True)
