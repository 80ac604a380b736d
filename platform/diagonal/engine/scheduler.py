"""Which sessions get the next forward: least playout slack first, with those that can share its batch. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A session that asks for its next chunk; sessions with equal keys can share one forward.

    One that is not `paced` has no viewer who waits: it takes the time that paced ones leave.
    """

    session_id: str
    slack_s: float
    batch_key: Hashable
    paced: bool = True


def choose(
    candidates: Sequence[Candidate], batch_limit: int, background_limit: Callable[[Hashable], int] | None = None
) -> list[str]:
    """Session ids of the next batch: the one with the least slack, then its equals in order of slack.

    Paced sessions come before all others, and none of the others joins their batch, which would delay it.
    `background_limit` bounds a batch of the others by its key, so that it does not keep a paced one waiting for long.
    """
    if not candidates:
        return []
    ordered = sorted(candidates, key=lambda c: (not c.paced, c.slack_s, c.session_id))
    first = ordered[0]
    limit = batch_limit
    if not first.paced and background_limit is not None:
        limit = min(batch_limit, background_limit(first.batch_key))
    together = [c for c in ordered if (c.batch_key, c.paced) == (first.batch_key, first.paced)]
    return [c.session_id for c in together][:limit]
