"""A viewer's playback: where he is in a stream that he plays as it comes, and how long he waits where it is late."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass
class Playback:
    """Plays since `zero_s`, on any clock that never jumps; None before the first chunk. A late chunk moves it on."""

    zero_s: float | None = None

    def position_s(self, now_s: float) -> float:
        """Seconds of media played by then, were there always enough."""
        return 0.0 if self.zero_s is None else now_s - self.zero_s

    def slack_s(self, now_s: float, media_s: float) -> float:
        """Seconds until `media_s` seconds of media are played; minus infinity before the first chunk."""
        return -inf if self.zero_s is None else media_s - (now_s - self.zero_s)

    def arrived(self, now_s: float, media_s: float) -> float:
        """A chunk came behind `media_s` seconds of media: how long the viewer waited for it. The first one begins."""
        late_s = -self.slack_s(now_s, media_s)
        if late_s <= 0:
            return 0.0
        self.zero_s = now_s - media_s
        return 0.0 if late_s == inf else late_s

    def begin(self, now_s: float, media_s: float, ahead_s: float | None) -> None:
        """Of `media_s` seconds of media `ahead_s` are left to play now; None leaves it as it is."""
        if ahead_s is not None:
            self.zero_s = now_s - (media_s - ahead_s)
