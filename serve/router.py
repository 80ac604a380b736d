"""Sessions stick to the replica that holds their cache; new ones go where the fewest are.

A session's address names its replica (`address`), so that any gateway's router finds it with nothing to remember and
nothing to wait for. Routers are pickled by value: this file imports Ray and the standard library only.
"""

from __future__ import annotations

import hashlib
import time
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


class SessionRouter(RequestRouter):
    """Chooses the named replica, else the least loaded one that is well, ties broken by rendezvous hashing."""

    def initialize_state(self, **_: Any) -> None:
        self._assigned: dict[str, list[float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        holder, _, session = pending_request.metadata.session_id.rpartition(_SEPARATOR)
        named = [replica for replica in candidate_replicas if holder and _name(replica) == holder]
        if named:
            return [named]
        # Of a replica that is gone: any other one answers that it does not know the session.
        avoided = holder.removeprefix(_NOT) if holder.startswith(_NOT) else ""
        ranked = sorted(candidate_replicas, key=lambda replica: (
            _name(replica) == avoided, not replica.routing_stats.get("well", True),
            self._load(replica), _weight(replica, session),
        ))  # fmt: skip
        if session and (avoided or not holder):
            self._assigned.setdefault(_name(ranked[0]), []).append(time.monotonic())
        return [[replica] for replica in ranked]

    def _load(self, replica: RunningReplica) -> int:
        recent = [at for at in self._assigned.get(_name(replica), []) if time.monotonic() - at < _STATISTICS_AGE_S]
        self._assigned[_name(replica)] = recent
        return int(replica.routing_stats.get("sessions", 0)) + len(recent)


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _weight(replica: RunningReplica, session: str) -> bytes:
    return hashlib.blake2b(f"{_name(replica)}{_SEPARATOR}{session}".encode(), digest_size=8).digest()
