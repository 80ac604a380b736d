"""Which sessions get the next forward: least playout slack first, with those that can share its batch. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf

StepSeconds = Callable[[Hashable, int], float]


@dataclass(frozen=True)
class Candidate:
    """A session that asks for its next chunk; sessions with equal keys can share one forward.

    `slack_s` is what is left until its viewer runs out of media, less `recache_s`, what it needs before its chunk.
    One that is not `paced` has no viewer who waits: it takes the time that paced ones leave.
    """

    session_id: str
    slack_s: float
    batch_key: Hashable
    paced: bool = True
    recache_s: float = 0.0

    @property
    def deadline_s(self) -> float:
        """From now until its viewer runs out of media."""
        return self.slack_s + self.recache_s


def choose(
    candidates: Sequence[Candidate], batch_limit: int, step_s: StepSeconds | None = None, background_s: float = inf
) -> list[str]:
    """Session ids of the next batch: the one with the least slack, then its equals in order of slack.

    By `step_s(key, sessions)`, the seconds of a step, a batch is cut so that it ends before the deadline of each of its
    members. Where even the first alone would be late, the batch is full: that makes up for lost time. Paced sessions
    come before all others, none of which joins their batch; a batch of the others takes `background_s` at most (or is
    one session), so that it does not keep a paced one waiting for long.
    """
    if not candidates:
        return []
    ordered = sorted(candidates, key=lambda c: (not c.paced, c.slack_s, c.session_id))
    first = ordered[0]
    together = [c for c in ordered if (c.batch_key, c.paced) == (first.batch_key, first.paced)][:batch_limit]
    if step_s is None:
        return [c.session_id for c in together]
    fitting = [size for size in range(1, len(together) + 1) if _in_time(together[:size], step_s, background_s)]
    late = len(together) if first.paced else 1
    return [c.session_id for c in together[: max(fitting, default=late)]]


def _in_time(batch: Sequence[Candidate], step_s: StepSeconds, background_s: float) -> bool:
    """Whether re-caches and the shared step of a batch end before its tightest deadline."""
    ends_s = step_s(batch[0].batch_key, len(batch)) + sum(candidate.recache_s for candidate in batch)
    return ends_s <= (min(candidate.deadline_s for candidate in batch) if batch[0].paced else background_s)
