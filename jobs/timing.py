"""Times for people, and whether it is time again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Whether it is time again."""

    every_s: float
    last_s: float = field(default_factory=lambda: time.monotonic())

    def rings(self) -> bool:
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
