"""Continues a session on another replica when its own is gone: from its newest snapshot, with the same stream."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from serve.actors import ReplicaApi, Replicas, StoreApi
from serve.gateway.replica_session import GONE, ReplicaSession
from serve.policies.routing import elsewhere
from serve.records import InteractionKind, Opened, OpenSession, Refused, VideoRecord
from serve.rpc import UNAVAILABLE, call, call_with_retry

_LOG = logging.getLogger("ray.serve")
PATIENCE_S = 10.0  # of a viewer before a stream that stands still counts as ended
FULL_PATIENCE_S = 60.0  # where there are replicas, but none has room just now: some session ends by then
UNWATCHED_PATIENCE_S = 120.0  # of a video that nobody watches: Serve has put a replica up again by then
_CALL_TIMEOUT_S = 4.0
WAIT_S = 0.2


async def rehome(
    video: VideoRecord,
    store: StoreApi,
    replicas: Replicas,
    ahead_s: float,
    patience_s: float = PATIENCE_S,
    once: bool = False,
) -> VideoRecord | Refused | None:
    """The session on another replica, its new driver being the caller; why not; or None: another driver has it.

    `ahead_s` is the media that the viewer has left. `once` tries once, for a session whose own replica may still have
    it: that one then refuses. What is tried again is harmless: a replica that was asked twice
    lets the first session go, and only the newest epoch may add chunks.
    """
    began_s = time.monotonic()
    anywhere = replicas.at(elsewhere(video.replica, video.id))
    while True:
        opened, from_start = await _take_up(video, store, anywhere, ahead_s, once)
        if isinstance(opened, Opened):
            return await _claim(video, opened, store, replicas, from_start)
        final = opened.retry_after_s is None and opened is not GONE and opened.param != "session_id"
        left_s = max(patience_s, FULL_PATIENCE_S) if opened.retry_after_s is not None else patience_s
        if once or final or time.monotonic() + WAIT_S > began_s + left_s:
            return opened
        await asyncio.sleep(WAIT_S)


async def _take_up(
    video: VideoRecord, store: StoreApi, anywhere: ReplicaApi, ahead_s: float, once: bool
) -> tuple[Opened | Refused, bool]:
    """One try, and whether the session begins at its first chunk again: where no more than that is made, which is the
    same again."""
    parts = await call_with_retry(lambda: store.snapshots(video.id))
    if not parts and video.chunks_done > 1:
        return Refused("session_lost", GONE.message, "snapshot"), False
    try:
        if parts:
            tried = anywhere.restore(parts, video.scale, ahead_s, video.traceparent)
        else:
            tried = anywhere.open(OpenSession.of(video))
        opened = await call(tried, _CALL_TIMEOUT_S)
        if not once and isinstance(opened, Refused) and opened.param == "session_id":  # from a try that was not heard
            await call(anywhere.close(video.id, "moved"), _CALL_TIMEOUT_S)
        return opened, not parts
    except UNAVAILABLE:
        return GONE, False


async def _claim(
    video: VideoRecord, opened: Opened, store: StoreApi, replicas: Replicas, from_start: bool
) -> VideoRecord | None:
    session = ReplicaSession(replicas, replace(video, replica=opened.replica))
    claimed = await call_with_retry(lambda: store.claim(video.id, opened.replica, video.epoch))
    if claimed is None:
        await session.close("moved")
        return None
    for change in claimed.interactions:  # one that the snapshot holds, too, is applied at the same chunk: no harm
        missing = change.chunk is None or from_start  # what the first chunk showed is not in one that begins again
        if missing and change.kind is InteractionKind.PROMPT:
            await session.apply(change)
    _LOG.warning("video %s continues with chunk %d on %s", video.id, claimed.chunks_done, opened.replica)
    return replace(claimed, traceparent=video.traceparent)
