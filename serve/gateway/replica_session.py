"""One session at the replica that holds it: its chunks pulled as they come, and whether it is still there."""

from __future__ import annotations

import contextlib
from typing import Any

from serve.policies.routing import address
from serve.records import EncodedChunk, Refused, VideoRecord
from serve.rpc import UNAVAILABLE, answer

GONE = Refused("session_lost", "the part of the service that held the session is gone")
_SLICE_S = 2.0  # a replica answers a pull within this, with a chunk or without
_SILENCE_S = 4.0  # and any call within this much more, or its process hangs


class Holder:
    """Every call ends in time: a replica that is gone, or whose process hangs, answers as one that lost the session.

    Serve's router drops a replica when it begins to drain it, and a call for its session then reaches another one:
    to that one the session is unknown, which is how a drain is noticed.
    """

    def __init__(self, replicas: Any, video: VideoRecord) -> None:
        self._video_id, self._name = video.id, video.replica
        self._replica = replicas.options(session_id=address(video.replica, video.id))

    async def pull(
        self, chunk: int, ahead: int, since_chunk: int | None = None
    ) -> tuple[EncodedChunk, ...] | Refused | None:
        """The chunk and those behind it that are there (`Replica.pull`); None when it is still being made."""
        try:
            call = self._replica.pull.remote(self._video_id, chunk, ahead, since_chunk, _SLICE_S)
            made: tuple[EncodedChunk, ...] | Refused | None = await answer(call, _SLICE_S + _SILENCE_S)
            return made
        except UNAVAILABLE:
            return GONE

    async def lost(self) -> bool:
        """Whether the session is to be moved: its replica is gone, drains, hangs, or let it go."""
        try:
            return not await answer(self._replica.holds.remote(self._video_id, self._name), _SILENCE_S)
        except UNAVAILABLE:
            return True

    async def pause(self) -> None:
        """Free the session's cache, if it is still there."""
        with contextlib.suppress(*UNAVAILABLE):
            await answer(self._replica.pause.remote(self._video_id), _SILENCE_S)

    async def resume(self) -> bool:
        """Whether the session may go on; a replica that lost it says so at the next pull."""
        with contextlib.suppress(*UNAVAILABLE):
            refused = await answer(self._replica.resume.remote(self._video_id), _SILENCE_S)
            return not (isinstance(refused, Refused) and refused.retry_after_s is not None)
        return True

    async def recording(self) -> str | None:
        """The log of a recorded session, if it is still there."""
        with contextlib.suppress(*UNAVAILABLE):
            told = await answer(self._replica.recording.remote(self._video_id), _SILENCE_S)
            return None if isinstance(told, Refused) else str(told)
        return None

    async def close(self, outcome: str) -> None:
        """Free the session's slot, if that replica is still there."""
        with contextlib.suppress(*UNAVAILABLE):
            await answer(self._replica.close.remote(self._video_id, outcome, self._name), _SILENCE_S)
