"""How far generation may run ahead of who watches: the lead is the delay of a prompt change."""

from __future__ import annotations

from collections.abc import Callable


class PlaybackClock:
    """Where a viewer is who plays from when he came, and waits whenever generation has not got that far.

    `now` gives seconds on a clock that never jumps.
    """

    def __init__(self, lead_s: float, now: Callable[[], float]) -> None:
        self._lead_s, self._now = lead_s, now
        self._zero_s: float | None = None
        self._paused_s: float | None = None
        self.stalls, self.stall_s = 0, 0.0

    @property
    def started(self) -> bool:
        return self._zero_s is not None

    def start(self, position_s: float = 0.0) -> None:
        """The first viewer is there, and plays from there on."""
        if self._zero_s is None:
            self._zero_s = self._now() - position_s

    def pause(self) -> None:
        """The viewer stops for a while: his position stands still, and nothing is a stall."""
        if self._paused_s is None:
            self._paused_s = self._now()

    def resume(self) -> None:
        """He goes on from where he stopped."""
        if self._paused_s is not None and self._zero_s is not None:
            self._zero_s += self._now() - self._paused_s
        self._paused_s = None

    def position_s(self) -> float:
        """Seconds of media played, were there always enough."""
        if self._zero_s is None:
            return 0.0
        return (self._now() if self._paused_s is None else self._paused_s) - self._zero_s

    def wait_s(self, media_s: float) -> float:
        """How long until the next chunk may be made, when `media_s` seconds are there; infinite with no viewer.

        It may be made while the media buffered before it is under the lead.
        """
        ahead_s = media_s - self.position_s()
        if ahead_s < self._lead_s:
            return 0.0
        return ahead_s - self._lead_s if self.started else float("inf")

    def arrived(self, media_s: float) -> float:
        """A chunk came, up to which there had been `media_s` seconds; returns how long the viewer waited for it."""
        late_s = self.position_s() - media_s
        if self._zero_s is None or late_s <= 0 or media_s == 0:
            return 0.0
        self._zero_s += late_s
        self.stalls += 1
        self.stall_s += late_s
        return late_s
