"""One session at the replica that holds it: every call ends in time, whatever became of the replica."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import ActorUnavailableError

from serve.actors import ReplicaApi, Replicas
from serve.policies.routing import address
from serve.records import EncodedChunk, Interaction, InteractionKind, Opened, OpenSession, Refused, VideoRecord
from serve.rpc import UNAVAILABLE, call

T = TypeVar("T")
GONE = Refused("session_lost", "the part of the service that held the session is gone")
SILENT = Refused("replica_silent", "the replica does not answer in time", retry_after_s=1.0)
LEFT = Refused("session_lost", "the replica drains, was replaced, or let the session go")
_OPEN_TIMEOUT_S = 10.0  # a replica that is well answers within a second; who waits for a new video gives up by then
_SLICE_S = 2.0  # a replica answers a pull within this, with a chunk or without
_SILENCE_S = 4.0  # and any call within this much more, or it is silent


async def open_session(replicas: Replicas, video: VideoRecord) -> Opened | Refused:
    """Begin the video's session at the replica that has the most room; `UNAVAILABLE` when none answers in time."""
    replica = replicas.at(address("", video.id))
    return await call(replica.open(OpenSession.of(video)), _OPEN_TIMEOUT_S)


async def check_room(replicas: Replicas, video: VideoRecord) -> Refused | None:
    """What `open_session` would refuse now; nothing changes."""
    return await call(replicas.at(address("", video.id)).check_room(OpenSession.of(video)), _OPEN_TIMEOUT_S)


class ReplicaSession:
    """A replica that is gone answers as one that lost the session; one that is only slow is SILENT, which is no loss.

    Serve's router drops a replica when it begins to drain it, and a call for its session then reaches another one:
    to that one the session is unknown, which is how a drain is noticed.
    """

    def __init__(self, replicas: Replicas, video: VideoRecord) -> None:
        self._video_id, self._replica_name = video.id, video.replica
        self._replica: ReplicaApi = replicas.at(address(video.replica, video.id))

    async def pull(
        self, chunk: int, ahead: int, since_chunk: int | None = None
    ) -> tuple[EncodedChunk, ...] | Refused | None:
        """The chunk and those behind it that are there (`Replica.pull`); None when it is still being made."""
        return await _answer(
            self._replica.pull(self._video_id, chunk, ahead, since_chunk, _SLICE_S), _SLICE_S + _SILENCE_S
        )

    async def trouble(self) -> Refused | None:
        """Why the session is to be moved: its replica is gone, drains, hangs, or let it go; None when it is well."""
        holds = await _answer(self._replica.holds(self._video_id, self._replica_name))
        if isinstance(holds, Refused):
            return holds
        return None if holds else LEFT

    async def pause(self) -> Refused | None:
        """Free the session's cache."""
        return await _answer(self._replica.pause(self._video_id))

    async def resume(self) -> Refused | None:
        """Let chunks be made again; the refusal has `retry_after_s` where there is no room now."""
        return await _answer(self._replica.resume(self._video_id))

    async def apply(self, change: Interaction) -> Refused | None:
        """Do what a viewer asked for."""
        if change.kind is InteractionKind.PAUSE:
            return await self.pause()
        if change.kind is InteractionKind.RESUME:
            return await self.resume()
        about = (change.event_id, change.prompt, change.transition_chunks)
        return await _answer(self._replica.interact(self._video_id, *about))

    async def recording(self) -> str | None:
        """The log of a recorded session, if it is still there."""
        text = await _answer(self._replica.recording(self._video_id))
        return None if isinstance(text, Refused) else text

    async def close(self, outcome: str) -> None:
        """Free the session's place, if that replica still has it; no error, and never longer than a call may take."""
        await _answer(self._replica.close(self._video_id, outcome, self._replica_name))


async def _answer(response: Awaitable[T], timeout_s: float = _SILENCE_S) -> T | Refused:
    try:
        return await call(response, timeout_s)
    except (TimeoutError, ActorUnavailableError):
        return SILENT
    except UNAVAILABLE:
        return GONE
