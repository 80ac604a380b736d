"""Who waits for news of a video, who reads it and who drives it: lost with the store's process, and found again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from serve.records import LIVE, DriveDecision


@dataclass
class Reader:
    """One connection: when it last asked, and how far it has played if it tells."""

    asked_at: float
    position_s: float | None = None
    window_s: float | None = None


@dataclass
class Presence:
    """One video. Times are monotonic."""

    news: asyncio.Event = field(default_factory=asyncio.Event)
    readers: dict[str, Reader] = field(default_factory=dict)
    had_reader: bool = False
    driven_at: float = float("-inf")
    return_by: float = float("-inf")
    over: bool = False

    def saw_reader(self, name: str) -> None:
        now = time.monotonic()
        self.readers.setdefault(name, Reader(now)).asked_at = now
        self.had_reader, self.return_by = True, float("-inf")

    def report_position(self, name: str, position_s: float, window_s: float) -> None:
        self.saw_reader(name)
        reader = self.readers[name]
        reader.position_s, reader.window_s = max(position_s, reader.position_s or 0.0), window_s

    def forget_silent(self, silence_s: float, return_s: float = 0.0) -> None:
        """Forget readers whose gateway died without a word; the owner of a session may come back within `return_s`."""
        now = time.monotonic()
        silent = [name for name, reader in self.readers.items() if now - reader.asked_at >= silence_s]
        for name in silent:
            del self.readers[name]
        if any(name.startswith(LIVE) for name in silent):
            self.return_by = now + return_s

    def notify(self) -> None:
        """Wake everybody who waits."""
        self.news.set()
        self.news = asyncio.Event()

    def decision(self, paused: bool = False) -> DriveDecision:
        """What a driver needs to know of the readers: the slowest one that tells its position sets the pace."""
        telling = [reader for reader in self.readers.values() if reader.position_s is not None]
        slowest = min(telling, key=lambda reader: reader.position_s or 0.0, default=None)
        return DriveDecision(
            True,
            readers=len(self.readers),
            had_reader=self.had_reader,
            position_s=slowest.position_s if slowest else None,
            window_s=slowest.window_s if slowest else None,
            returning=not self.readers and time.monotonic() < self.return_by,
            paused=paused,
        )
