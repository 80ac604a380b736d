"""In an overload, what was refused a moment ago is refused again without asking: it costs those who are in nothing.

One at a time asks anew, so that places that fall free are filled one after the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

from serve.records import Pacing, Refused, VideoRecord

_HOLD_S = 2.0  # at most, and no longer than whoever was refused was told to wait
_MANY, _WITHIN_S = 8, 1.0  # so many refusals in a second are an overload
_ASKING_S = 0.5  # while one asks anew, the others are told the old answer, for so long at most
_LATELY_S = 10.0  # after a refusal it is well to ask for room before anything is written down


@dataclass
class _Known:
    """Of one kind of request: the newest answer of a replica, when one last asked anew, and the newest refusals."""

    refusal: Refused
    asked_s: float
    asking_s: float = -inf
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

    @contextmanager
    def probe(self, video: VideoRecord) -> Iterator[None]:
        """Whoever asks inside, as `cached_refusal` told nothing, has an answer at its end: the next one may ask."""
        try:
            yield
        finally:
            self.clear_probe(video)

    def clear_probe(self, video: VideoRecord) -> None:
        """Whoever asked as `cached_refusal` told nothing has an answer: the next one may ask."""
        if known := self._known.get((video.model, video.pacing)):
            known.asking_s = -inf

    def refused_recently(self, video: VideoRecord) -> bool:
        """Whether a replica refused one like it not long ago."""
        known = self._known.get((video.model, video.pacing))
        return known is not None and self._now() - known.asked_s < _LATELY_S

    def cached_refusal(self, video: VideoRecord) -> Refused | None:
        """The refusal of one like it, if that is one of many, and fresh or being asked for anew by another."""
        known, now_s = self._known.get((video.model, video.pacing)), self._now()
        if known is None or len(known.told_s) < _MANY or now_s - known.told_s[0] >= _WITHIN_S:
            return None
        fresh = now_s - known.asked_s < min(_HOLD_S, known.refusal.retry_after_s or 0.0)
        if not fresh and now_s - known.asking_s >= _ASKING_S:
            known.asking_s = now_s
            return None
        known.told_s.append(now_s)
        return known.refusal
