"""In an overload, what was refused a moment ago is refused again without asking: it costs those who are in nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.records import Pacing, Refused, VideoRecord

_HOLD_S = 2.0  # at most, and no longer than whoever was refused was told to wait
_MANY, _WITHIN_S = 8, 1.0  # so many refusals in a second are an overload


@dataclass
class _Known:
    """Of one kind of request: the newest answer of a replica, and when the newest refusals were told."""

    refusal: Refused
    asked_s: float
    told_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MANY))


class RecentRefusals:
    """What replicas refused, by release and pacing; `now` gives seconds on a clock that never jumps."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._known: dict[tuple[str, Pacing], _Known] = {}

    def note(self, video: VideoRecord, refusal: Refused) -> None:
        """A replica had no room for that video; what it would refuse at any time is not remembered."""
        if refusal.retry_after_s is None:
            return
        now_s = self._now()
        known = self._known.setdefault((video.model, video.pacing), _Known(refusal, now_s))
        known.refusal, known.asked_s = refusal, now_s
        known.told_s.append(now_s)

    def of(self, video: VideoRecord) -> Refused | None:
        """The refusal of one like it, if that is fresh and one of many."""
        known, now_s = self._known.get((video.model, video.pacing)), self._now()
        if known is None or now_s - known.asked_s >= min(_HOLD_S, known.refusal.retry_after_s or 0.0):
            return None
        if len(known.told_s) < _MANY or now_s - known.told_s[0] >= _WITHIN_S:
            return None
        known.told_s.append(now_s)
        return known.refusal
