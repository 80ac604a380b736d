"""Which sessions get the next forward: least playout slack first, with those that can share its batch. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A session that asks for its next chunk; sessions with equal keys can share one forward."""

    session_id: str
    slack_s: float
    batch_key: Hashable


def choose(candidates: Sequence[Candidate], batch_limit: int) -> list[str]:
    """Session ids of the next batch: the one with the least slack, then its equals in order of slack."""
    if not candidates:
        return []
    ordered = sorted(candidates, key=lambda c: (c.slack_s, c.session_id))
    return [c.session_id for c in ordered if c.batch_key == ordered[0].batch_key][:batch_limit]
