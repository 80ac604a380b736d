"""Takes a session up elsewhere when its replica is gone: from its newest snapshot, with the same stream going on."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

from serve.policies.routing import address, elsewhere
from serve.records import InteractionKind, Opened, Refused, VideoRecord
from serve.rpc import UNAVAILABLE, answer, patient

_LOG = logging.getLogger("ray.serve")
PATIENCE_S = 10.0  # of a viewer before a stream that stands still counts as ended
FULL_PATIENCE_S = 60.0  # of who knows that there are replicas, but none has room just now: some session ends by then
UNWATCHED_PATIENCE_S = 120.0  # of a video that nobody watches: Serve has put a replica up again by then
_CALL_TIMEOUT_S = 4.0
WAIT_S = 0.2
_LOST = Refused("session_lost", "the part of the service that held the session is gone")


async def rehome(
    video: VideoRecord, store: Any, replica: Any, ahead_s: float, patience_s: float = PATIENCE_S
) -> VideoRecord | Refused | None:
    """The session on another replica, its new driver being the caller; why not; or None: another driver has it.

    `ahead_s` is the media that the viewer has left. What is tried again is harmless: a replica that was asked twice
    lets the first session go, and only the newest epoch may add chunks.
    """
    began_s = time.monotonic()
    anywhere = replica.options(session_id=elsewhere(video.replica, video.id))
    while True:
        opened, anew = await _take_up(video, store, anywhere, ahead_s)
        if isinstance(opened, Opened):
            return await _claim(video, opened, store, replica, anew)
        final = opened.retry_after_s is None and opened is not _LOST and opened.param != "session_id"
        left_s = max(patience_s, FULL_PATIENCE_S) if opened.retry_after_s is not None else patience_s
        if final or time.monotonic() + WAIT_S > began_s + left_s:
            return opened
        await asyncio.sleep(WAIT_S)


async def _take_up(video: VideoRecord, store: Any, anywhere: Any, ahead_s: float) -> tuple[Opened | Refused, bool]:
    """One try, and whether the session began anew: where nothing or the first chunk alone is made, which is the same
    again."""
    parts: list[bytes] = await patient(lambda: store.snapshots.remote(video.id))
    if not parts and video.chunks_done > 1:
        return Refused("session_lost", _LOST.message, "snapshot"), False
    try:
        if parts:
            tried = anywhere.restore.remote(parts, video.scale, ahead_s, video.traceparent)
        else:
            tried = anywhere.open.remote(*opening(video))
        opened: Opened | Refused = await answer(tried, _CALL_TIMEOUT_S)
        if isinstance(opened, Refused) and opened.param == "session_id":  # it is there from a try that was not heard
            await answer(anywhere.close.remote(video.id, "moved"), _CALL_TIMEOUT_S)
        return opened, not parts
    except UNAVAILABLE:
        return _LOST, False


async def _claim(video: VideoRecord, opened: Opened, store: Any, replica: Any, anew: bool) -> VideoRecord | None:
    holder = replica.options(session_id=address(opened.replica, video.id))
    mine: VideoRecord | None = await patient(lambda: store.claim.remote(video.id, opened.replica, video.epoch))
    if mine is None:
        await answer(holder.close.remote(video.id, "moved"))
        return None
    for change in mine.interactions:  # one that the snapshot knows, too, is applied at the same chunk: no harm
        unknown = change.chunk is None or anew  # what the first chunk showed is not in the session that began anew
        if unknown and change.kind is InteractionKind.PROMPT:
            about = (change.event_id, change.prompt, change.transition_chunks)
            await answer(holder.interact.remote(video.id, *about))
    _LOG.warning("video %s goes on with chunk %d on another replica", video.id, mine.chunks_done)
    return replace(mine, traceparent=video.traceparent)


def opening(video: VideoRecord) -> tuple[str, str, int, int | None, int, bool, bool, str]:
    """Arguments with which a replica opens a video's session."""
    asked = (video.id, video.prompt, video.seed, video.frames or None)
    return (*asked, video.scale, video.live, video.record, video.traceparent)
