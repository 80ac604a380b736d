"""Sessions stick to the replica that holds their cache; new ones go where the fewest are.

A session's address names its replica (`address`), so that any gateway's router finds it with nothing to remember and
nothing to wait for. Routers are pickled by value: this file imports Ray and the standard library only.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

_SEPARATOR = "/"
_NOT = "!"
_STATISTICS_AGE_S = 3.0  # of what replicas report; what this router assigned since is added


def address(replica: str, session_id: str) -> str:
    """The session id to call a handle with: of a session that `replica` holds, or of a new one when it is ''."""
    return f"{replica}{_SEPARATOR}{session_id}" if replica else session_id


def elsewhere(replica: str, session_id: str) -> str:
    """The session id to call a handle with, of a session that `replica` held: any other one is better."""
    return f"{_NOT}{replica}{_SEPARATOR}{session_id}"


Standing = tuple[str, int, bool]  # a name, the sessions that it told last, and whether it is well


class Ranking:
    """The order in which one router tries replicas; `now` gives seconds on a clock that never jumps. No Ray in it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._assigned: deque[tuple[float, str]] = deque()
        self._counts: Counter[str] = Counter()

    def order(self, told: Iterable[Standing], session: str, avoided: str = "") -> Iterator[str]:
        """Names, best first: not the avoided one, well, the least loaded; ties broken by rendezvous hashing."""
        self._forget()
        counts, groups = self._counts, dict[tuple[bool, bool, int], list[str]]()
        for name, sessions, well in told:
            load = sessions + counts[name] if name in counts else sessions
            groups.setdefault((name == avoided, not well, load), []).append(name)
        for key in sorted(groups):
            yield from sorted(groups[key], key=lambda name: _weight(name, session))

    def assign(self, name: str) -> None:
        """A new session was sent there: it counts until the replica tells of it itself."""
        self._assigned.append((self._now(), name))
        self._counts[name] += 1

    def _forget(self) -> None:
        now_s = self._now()
        while self._assigned and now_s - self._assigned[0][0] >= _STATISTICS_AGE_S:
            _, name = self._assigned.popleft()
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]


class SessionRouter(RequestRouter):
    """Chooses the named replica, else the least loaded one that is well (`Ranking`)."""

    def initialize_state(self, **_: Any) -> None:
        self._ranking = Ranking()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        holder, _, session = pending_request.metadata.session_id.rpartition(_SEPARATOR)
        by_name = {_name(replica): replica for replica in candidate_replicas}
        if holder in by_name:
            return [[by_name[holder]]]
        # Of a replica that is gone: any other one answers that it does not know the session.
        avoided = holder.removeprefix(_NOT) if holder.startswith(_NOT) else ""
        ranked = list(self._ranking.order(map(_standing, candidate_replicas), session, avoided))
        if session and (avoided or not holder):
            self._ranking.assign(ranked[0])
        return [[by_name[name]] for name in ranked]


def _standing(replica: RunningReplica) -> Standing:
    stats = replica.routing_stats
    return _name(replica), int(stats.get("sessions", 0)), bool(stats.get("well", True))


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _weight(name: str, session: str) -> bytes:
    return hashlib.blake2b(f"{name}{_SEPARATOR}{session}".encode(), digest_size=8).digest()
