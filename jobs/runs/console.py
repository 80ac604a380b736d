"""Times for people, whether it is time again, and how far a loop in one process has come."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tqdm import tqdm

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


class Pace:
    """Updates a second over the newest ones. The first two of a start compile and warm up: they count
    until there are others."""

    def __init__(self, window: int = 50, warm_up: int = 2) -> None:
        self._warm_up, self._updates = warm_up, 0
        self._times_s = deque([time.monotonic()], maxlen=window + 1)

    def update(self) -> float:
        """Count one update; returns the rate now."""
        self._updates += 1
        if self._updates == self._warm_up + 1:
            self._times_s = deque([self._times_s[-1]], maxlen=self._times_s.maxlen)
        self._times_s.append(time.monotonic())
        return (len(self._times_s) - 1) / max(self._times_s[-1] - self._times_s[0], 1e-9)


@dataclass(frozen=True)
class Position:
    """How far a stage has come: `update` of `last`, at so many updates a second, with the newest figures as text."""

    update: int
    last: int
    rate: float
    figures: str

    def __str__(self) -> str:
        left = duration((self.last - self.update) / self.rate)
        return f"update {self.update}/{self.last}, {self.rate:.3g}/s, about {left} left; {self.figures}"


class Bar:
    """One bar on the terminal."""

    def __init__(self, stage: str) -> None:
        self._bar = tqdm(
            desc=stage, disable=False, dynamic_ncols=True, bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}"
        )

    def show(self, position: Position) -> None:
        self._bar.total, self._bar.n = position.last, position.update
        self._bar.set_postfix_str(str(position))

    def close(self) -> None:
        self._bar.close()


def has_bar() -> bool:
    """Whether progress is a bar: on a terminal; elsewhere it is lines."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class Progress:
    """How far a loop in this process has come: the newest losses and the time left."""

    def __init__(self, stage: str, updates: int) -> None:
        self._stage, self._updates = stage, updates
        self._pace, self._interval, self._bar = Pace(), Interval(PROGRESS_EVERY_S), Bar(stage) if has_bar() else None

    def __call__(self, update: int, figures: Mapping[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        position = Position(update, self._updates, self._pace.update(), shown)
        if self._bar is not None:
            self._bar.show(position)
        elif self._interval.is_due() or update == self._updates:
            print(f"{self._stage}: {position}", flush=True)
