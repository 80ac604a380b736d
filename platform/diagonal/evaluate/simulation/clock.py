"""A clock that jumps: what is to happen, in order of time. Nothing sleeps."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Calendar:
    """Events by time; equal times in the order in which they were entered, so that a run is the same every time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def __call__(self) -> float:
        """Now, as clocks are asked."""
        return self.now_s

    def at(self, at_s: float, do: Callable[..., None], *about: Any) -> None:
        """Have `do(*about)` called at that time, or now where it is past."""
        self._number += 1
        heapq.heappush(self._events, (at_s if at_s > self.now_s else self.now_s, self._number, do, about))

    def after(self, wait_s: float, do: Callable[..., None], *about: Any) -> None:
        """Have `do(*about)` called so much later."""
        self.at(self.now_s + wait_s, do, *about)

    def every(self, period_s: float, do: Callable[[], None]) -> None:
        """Have `do()` called now and after each period."""
        do()
        self.after(period_s, self.every, period_s, do)

    def run(self, until_s: float) -> None:
        """Let time pass until then."""
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, do, about = heapq.heappop(events)
            do(*about)
        self.now_s = until_s
