"""The gateway's part between routes and actors: it keeps no state that another gateway would need."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import NoReturn

from diagonal.chain import Link
from diagonal.metrics import MetricsBackend
from serve.actors import StoreApi
from serve.gateway import hls
from serve.gateway.drivers import Drivers
from serve.gateway.fleet import Fleet
from serve.gateway.prompt_policy import PromptPolicy
from serve.gateway.reader import BrokenStreamError, ChunkReader
from serve.gateway.replica_session import ReplicaSession, check_room, open_session
from serve.gateway.requests import asked_change, new_video, new_video_id
from serve.policies.load_shedding import RecentRefusals
from serve.records import (
    KEPT_CHUNKS,
    MAX_VIEWERS,
    Caller,
    Guest,
    Idempotency,
    Interaction,
    InteractionKind,
    ModelInfo,
    Provenance,
    Refused,
    Role,
    Segment,
    Status,
    Usage,
    VideoRecord,
    Viewer,
)
from serve.rpc import CALL_TIMEOUT_S, UNAVAILABLE, call, call_with_retry, detached
from serve.settings import ServeSettings
from serve.tokens import CLIENT_SECRET_S, Secret
from serve.tracing import traces_of
from serve.wire.problems import Problem, not_found, refused, wrong_value
from serve.wire.schemas import InteractionRequest, VideoRequest, ViewerRequest

_READY_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 0.2
_PART_BYTES = 1 << 20


class Gateway:
    """What the routes do."""

    def __init__(
        self,
        settings: ServeSettings,
        store: StoreApi,
        fleet: Fleet,
        metrics: MetricsBackend,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_stopping` says whether this process is about to end (`serve.gateway.shutdown`)."""
        self.settings, self._store, self._fleet, self._metrics = settings, store, fleet, metrics
        self._traces = traces_of(settings, "gateway")
        self._drivers = Drivers(store, fleet, metrics, settings.reader_start_timeout_s)
        self._leaving: set[asyncio.Task[None]] = set()
        self._policy = PromptPolicy.from_settings(settings, metrics)
        self._refusals = RecentRefusals()
        self._provenance: Provenance | None = None
        self._is_stopping, self._draining = is_stopping, asyncio.Event()
        self._upkeep: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Begin the upkeep, inside the event loop that serves the routes."""
        self._upkeep = [detached(self._drivers.look_after_orphans()), detached(self._watch_for_stop())]

    async def drain(self) -> None:
        """This gateway is to end: it is not ready any more, and leaves its viewers and videos to the other ones."""
        self._draining.set()
        for task in self._upkeep[:1]:
            task.cancel()
        await self._drivers.let_go()

    async def wait_for_drain(self) -> None:
        """Until this gateway is to end: viewers then go on through another one."""
        await self._draining.wait()

    async def _watch_for_stop(self) -> None:
        while not self._is_stopping():
            await asyncio.sleep(_LOOK_EVERY_S)
        await self.drain()

    async def models(self) -> list[ModelInfo]:
        """What the releases serve."""
        return await self._fleet.infos()

    async def provenance(self) -> Provenance:
        """What tells where a video came from; asked for once."""
        if self._provenance is None:
            self._provenance = await call(self._store.provenance())
        return self._provenance

    async def chain(self, video_id: str, caller: Caller, start: int, limit: int) -> tuple[VideoRecord, list[Link]]:
        """The caller's video, and its chain from chunk `start` on, at most `limit` links."""
        video = await self.get(video_id, caller)
        return video, await call(self._store.links(video_id, start, limit))

    async def recording(self, video_id: str, caller: Caller) -> str:
        """The log of the caller's video, as far as it is made, from which it can be made again."""
        video = await self.get(video_id, caller)
        if not video.record:
            raise Problem(404, "no_recording", "the video was not asked for with extra.record", param="video_id")
        running = None if video.status.over else await self._session(video).recording()
        text = running or await call(self._store.recording(video_id))
        if text is None:
            raise Problem(404, "recording_gone", "the part of the service that kept the log is gone", param="video_id")
        return text

    def count_error(self, code: str) -> None:
        """Count an error that was told, by its code."""
        self._metrics.inc("diagonal_errors_total", code=code)

    async def check_ready(self) -> None:
        """`Problem` 503 unless the store and a replica with a running engine answer, and this gateway stays."""
        if self._draining.is_set():
            raise Problem(503, "draining", "this gateway is about to end; another one goes on", retry_after_s=1.0)
        try:
            ready = await call(self._store.ready(), _READY_TIMEOUT_S) and await self._fleet.ready()
        except UNAVAILABLE:
            ready = False
        if not ready:
            raise Problem(503, "not_ready", "the service is not ready", retry_after_s=1.0)

    async def caller(self, shown: Secret) -> Caller | None:
        """Whose key this is."""
        found = await call(self._store.caller(shown))
        return found

    async def redeem(self, shown: Secret) -> Caller | None:
        """Use a client secret up: who made it."""
        return await call(self._store.redeem(shown))

    async def create_client_secret(self, caller: Caller, seconds: float = CLIENT_SECRET_S) -> tuple[str, float]:
        """A secret with which a browser opens one session in the caller's name, and when it ends."""
        text, expires_at = await call(self._store.create_client_secret(caller.key_id, seconds))
        return text, float(expires_at)

    async def create(
        self,
        request: VideoRequest,
        caller: Caller,
        idempotency: Idempotency | None = None,
        resume_hash: str = "",
        traceparent: str = "",
    ) -> VideoRecord:
        """Admit a video: a replica holds its session before this answers, and a driver makes it.

        A caller who goes away meanwhile leaves nothing half made. `traceparent` names the caller's own span.
        """
        work = self._create(request, caller, idempotency, resume_hash, traceparent)
        return await asyncio.shield(detached(work))

    async def _create(
        self, request: VideoRequest, caller: Caller, idempotency: Idempotency | None, resume_hash: str, traceparent: str
    ) -> VideoRecord:
        began_s, video_id = time.monotonic(), new_video_id()
        with self._traces.span("create_video", traceparent) as span:
            info = await self._fleet.choose(video_id, request.model)
            video = new_video(request, info, time.time(), video_id)
            video = replace(video, owner=caller.key_id, account=caller.account, resume_hash=resume_hash)
            video = replace(video, traceparent=span)
            await self._policy.check(video.prompt, caller.account)
            with self._traces.span("admission", span, model=video.model), self._refusals.probe(video):
                earlier = await self._admit(video, caller, idempotency)
                if earlier is None:
                    video = await self._open(video, caller)
                    self._drivers.start(video)
            return replace(earlier or video, age_s=time.monotonic() - began_s)

    async def _admit(self, video: VideoRecord, caller: Caller, idempotency: Idempotency | None) -> VideoRecord | None:
        """Charge the caller's quotas; the video that this request made before, if it did. `Problem`: no room.

        What a replica would refuse is refused before anything is written, if one refused the like lately. A repeated
        request may be of a known video: it is always looked up.
        """
        if idempotency is None:
            if cached := self._refusals.cached_refusal(video):
                raise self._rejected(cached, "full_lately")
            if self._refusals.refused_recently(video):
                if refusal := await check_room(self._fleet.replicas(video), video):
                    self._refuse(video, refusal)
        earlier = await call(self._store.admit(video, caller, idempotency))
        if isinstance(earlier, Refused):
            raise self._rejected(earlier, "quota")
        return earlier

    async def _open(self, video: VideoRecord, caller: Caller) -> VideoRecord:
        """The video with a replica that holds its session; where there is none its admission is taken back."""
        session = None
        try:
            opened = await open_session(self._fleet.replicas(video), video)
            if isinstance(opened, Refused):
                self._refuse(video, opened)
            video = replace(video, status=Status.IN_PROGRESS, replica=opened.replica, mime=opened.mime)
            video = replace(video, prompt_tokens=opened.prompt_tokens)
            session = self._session(video)
            kept = await call(self._store.opened(video.id, opened.replica, opened.mime, opened.init))
        except (Problem, *UNAVAILABLE):
            if session is not None:
                await session.close("cancelled")
            with contextlib.suppress(*UNAVAILABLE):  # then it counts until the store's upkeep ends it
                await call_with_retry(lambda: self._store.withdraw(video, caller))
            raise
        if not kept:  # deleted meanwhile
            await session.close("cancelled")
            raise not_found(video.id)
        return video

    def _refuse(self, video: VideoRecord, refusal: Refused) -> NoReturn:
        self._refusals.note(video, refusal)
        raise self._rejected(refusal, refusal.reason or refusal.code)

    def _rejected(self, refusal: Refused, reason: str) -> Problem:
        """What the caller is told; counted here, once, if it is for lack of room: a driver's own tries are not."""
        if refusal.retry_after_s is not None:
            self._metrics.inc("diagonal_rejected_total", reason=reason)
        return refused(refusal)

    async def get(self, video_id: str, caller: Caller) -> VideoRecord:
        """The caller's video; whoever asks for one that nobody drives drives it."""
        video = await call(self._store.get(video_id))
        if video is None or video.owner != caller.key_id:
            raise not_found(video_id)
        if video.orphan:
            await self._drivers.adopt(video)
        return video

    async def newest(self, caller: Caller, limit: int, after: str | None, ascending: bool) -> list[VideoRecord]:
        return await call(self._store.newest(caller.key_id, limit, after, ascending))

    async def delete(self, video_id: str, caller: Caller) -> None:
        """Cancel the caller's video if it is not over, free its cache, and remove it."""
        video = await call(self._store.delete(video_id, caller.key_id))
        if video is None:
            raise not_found(video_id)
        if not video.status.over:
            await self._session(video).close("cancelled")

    async def share(self, video_id: str, asked: ViewerRequest, caller: Caller) -> tuple[str, Viewer]:
        """A token of the caller's video for somebody without a key, and its viewer."""
        await self.get(video_id, caller)
        made = await call(self._store.add_viewer(video_id, Role(asked.role), asked.name, asked.expires_in_s))
        if made is None:
            raise Problem(409, "too_many_viewers", f"a video has at most {MAX_VIEWERS} viewers: revoke one first")
        return made

    async def viewers(self, video_id: str, caller: Caller) -> list[Viewer]:
        """Who has a token of the caller's video."""
        await self.get(video_id, caller)
        return await call(self._store.viewers(video_id))

    async def revoke_viewer(self, video_id: str, viewer_id: str, caller: Caller) -> None:
        """End the token of a viewer of the caller's video."""
        await self.get(video_id, caller)
        if not await call(self._store.revoke_viewer(video_id, viewer_id)):
            raise Problem(404, "viewer_not_found", f"the video has no viewer {viewer_id!r}", param="viewer_id")

    async def guest(self, shown: Secret) -> Guest | None:
        """Whose token of a viewer this is."""
        return await call(self._store.guest(shown))

    async def steer(self, guest: Guest, request: InteractionRequest) -> str:
        """Change the prompt in a viewer's name; `Problem` 403 where he may not. Returns the event's id."""
        if guest.viewer.role is not Role.STEER:
            raise Problem(403, "watch_only", "this link is for watching: the video's owner gives links that steer")
        if request.interaction.event.action is not None:
            message = "a viewer changes the prompt alone: pausing is its owner's"
            raise Problem(403, "prompt_only", message, param="interaction.event.action")
        return await self.interact(guest.viewer.video_id, request, guest.owner, guest.viewer.name)

    async def interact(self, video_id: str, request: InteractionRequest, caller: Caller, made_by: str = "") -> str:
        """Change the prompt, pause or go on at the next chunk; returns the event's id. The same one is a retry.

        `made_by` names the viewer in whose name it is done, '' is the owner himself.
        """
        video = await self.get(video_id, caller)
        change = replace(asked_change(request, await self._fleet.info_of(video)), made_by=made_by)
        by_event = {one.event_id: one for one in video.interactions}
        noted: Interaction | bool | None = by_event.get(change.event_id)
        if noted is None:
            _check_takes_changes(video)
            if change.kind is InteractionKind.PROMPT:
                await self._policy.check(change.prompt, caller.account, "interaction.event.prompt")
            noted = await call(self._store.add_interaction(video_id, change))
        if noted is True:
            await self._apply(video, change)
        elif noted is False:
            raise Problem(429, "too_many_interactions", "too many prompt changes wait", retry_after_s=1.0)
        elif not change.says_the_same(noted):
            message = f"event {change.event_id!r} is already there, with other content"
            raise Problem(409, "event_id_conflict", message, param="interaction.event_id")
        return change.event_id

    async def usage(self, caller: Caller) -> Usage | None:
        """What the caller's account used of its quotas; None without quotas, or when the store does not answer."""
        if not (caller.sessions or caller.frames_per_minute):
            return None
        try:
            usage = await call(self._store.usage(caller))
        except UNAVAILABLE:
            return None
        return usage

    async def content_size(self, video_id: str, caller: Caller) -> int:
        """Bytes of the finished file; `Problem` says why there is none."""
        video = await self.get(video_id, caller)
        if video.endless:
            message = "a stream without an end has no finished file: what was received is all that there is"
            raise Problem(409, "no_file", message, param="video_id")
        if video.status is not Status.COMPLETED:
            message = f"the video is {video.status.value}, {video.frames_done} of {video.frames} frames are there"
            raise Problem(409, "video_not_ready", message, param="video_id")
        found = await call(self._store.content(video_id, 0, 0))
        if found is None:
            raise Problem(404, "content_gone", "the file is no longer there", param="video_id")
        return found[0]

    async def content(self, video_id: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes of the finished file; `BrokenStreamError` when it is removed meanwhile."""
        while start < stop:
            part = await call(self._store.content(video_id, start, min(stop, start + _PART_BYTES)))
            if part is None or not part[1]:
                raise BrokenStreamError(video_id)
            yield part[1]
            start += len(part[1])

    async def stream(self, video_id: str, start_chunk: int | None, caller: Caller) -> AsyncIterator[bytes]:
        """The initialisation segment, then every chunk from `start_chunk` on, each as soon as it is there.

        None is the first one; of a stream without an end it is the newest. `Problem` when it will never be there.
        """
        video = await self.get(video_id, caller)
        newest = max(0, video.chunks_done - 1)
        chunk = (newest if video.endless else 0) if start_chunk is None else start_chunk
        if video.endless and chunk < video.chunks_done - KEPT_CHUNKS:
            message = f"chunk {chunk} is no longer kept: the oldest is {video.chunks_done - KEPT_CHUNKS}"
            raise Problem(410, "chunk_gone", message, param="start_chunk")
        if start_chunk:
            end = video.chunks_done if video.status.over else (await self._fleet.info_of(video)).chunks(video.frames)
            if end is not None and chunk >= end:
                raise wrong_value(422, "invalid_value", "start_chunk", chunk, f"0 to {max(0, end - 1)}: then it ends")
        return self._segments(self.reader(video), chunk)

    async def playlist(self, video_id: str, wait_for: int | None, caller: Caller) -> tuple[str, bool]:
        """The HLS playlist of the caller's video, with chunk `wait_for` once it is there, and at least with the first;
        and whether it is the last one.

        `Problem` 400 for a chunk too far ahead, 503 where it does not come within three target durations.
        """
        video = await self.get(video_id, caller)
        target = 0
        if not video.status.over:
            longest = (await self._fleet.info_of(video)).geometry.chunk_pixel_frames(1)
            target = hls.target_s(longest, video.fps)
            video = await self._hls_awaited(video, wait_for or 0, hls.HOLD_BACK_TARGETS * target)
        first = max(0, video.chunks_done - KEPT_CHUNKS // 2) if video.endless else 0
        frames = await call(self._store.chunk_frames(video.id, first))
        target = target or hls.target_s(max(frames, default=1), video.fps)  # the release may be gone
        text = hls.playlist(frames, video.fps, target, first, ended=video.status.over, endless=video.endless)
        return text, video.status.over

    async def _hls_awaited(self, video: VideoRecord, chunk: int, wait_s: float) -> VideoRecord:
        """The video with that chunk, or when it is over."""
        most = video.chunks_done - 1 + hls.AHEAD
        if chunk > most:
            raise wrong_value(400, "invalid_value", "_HLS_msn", chunk, f"0 to {most}")
        if chunk < video.chunks_done:
            return video
        later = await call(self._store.awaited(video.id, hls.READER, chunk, wait_s), wait_s + CALL_TIMEOUT_S)
        if later is None:
            raise not_found(video.id)
        if later.orphan:
            await self._drivers.adopt_if_orphan(video.id)
        if chunk >= later.chunks_done and not later.status.over:
            raise Problem(503, "not_there_yet", f"chunk {chunk} is not there yet", retry_after_s=1.0)
        return later

    async def hls_part(self, video_id: str, chunk: int, caller: Caller) -> bytes:
        """The bytes of a chunk, -1 is the initialisation segment, waiting a moment for it.

        `Problem` 404 where it is not there yet or never will be, 410 where it is no longer kept.
        """
        video = await self.get(video_id, caller)
        segment = await self._hls_segment(video, chunk, 1.0)
        if segment is not None and segment.gone:
            raise Problem(410, "chunk_gone", f"chunk {chunk} is no longer kept", param="chunk")
        if segment is None or segment.data is None:
            raise Problem(404, "no_such_chunk", f"chunk {chunk} is not there", param="chunk")
        return segment.data

    async def _hls_segment(self, video: VideoRecord, chunk: int, wait_s: float) -> Segment | None:
        segment = await call(self._store.segment(video.id, hls.READER, chunk, wait_s), wait_s + CALL_TIMEOUT_S)
        if segment is not None and segment.orphan:
            await self._drivers.adopt_if_orphan(video.id)
        return segment

    def reader(self, video: VideoRecord, name: str = "", resumed: bool = False) -> ChunkReader:
        """A way through the video for one connection, or for one that goes on after a break; `leave_later` ends it."""
        return ChunkReader(
            video, self._store, lambda: self._drivers.adopt_if_orphan(video.id), self._metrics, name, resumed
        )

    def leave_later(self, reader: ChunkReader, return_s: float = 0.0) -> None:
        """Say that the connection is gone, even though its task is being cancelled."""
        task = detached(reader.leave(return_s))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def take_over(self, caller: Caller, old_hash: str, new_hash: str) -> VideoRecord | None:
        """The video of a resume token, whose only reader its holder now is; None when the token does not count."""
        taken = await call(self._store.take_over(caller.key_id, old_hash, new_hash))
        if taken is not None and not taken.status.over and taken.id not in self._drivers:
            await self._drivers.adopt(taken)  # its gateway may be gone: a driver that is still there gives way
        return taken

    async def cancel(self, video: VideoRecord, code: str, message: str) -> None:
        """End the video where it is, and free its session within a chunk."""
        if await call_with_retry(lambda: self._store.end(video.id, Status.CANCELLED, code, message)):
            session = self._session(video)
            if video.record and (text := await session.recording()):
                await call(self._store.put_recording(video.id, text))
            await session.close("cancelled")

    async def close(self) -> None:
        """This gateway goes away; other gateways take its videos over."""
        for task in self._upkeep:
            task.cancel()
        await self._drivers.let_go()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._upkeep, *self._leaving, return_exceptions=True)

    async def _segments(self, reader: ChunkReader, chunk: int) -> AsyncIterator[bytes]:
        returning_s = self.settings.resume_window_s  # nobody can tell a viewer who left from one who was cut off
        try:
            async for data in reader.segments(chunk):
                yield data
            returning_s = 0.0
        finally:
            self.leave_later(reader, returning_s)

    async def _apply(self, video: VideoRecord, change: Interaction) -> None:
        """Tell the replica. One that is gone is replaced by the session's driver, which tells the next one."""
        refusal = await self._session(video).apply(change)
        if refusal is None or refusal.code in ("session_lost", "replica_silent"):
            if change.kind is not InteractionKind.PROMPT:
                paused = change.kind is InteractionKind.PAUSE
                await call_with_retry(lambda: self._store.set_paused(video.id, change.event_id, paused))
            return
        await call_with_retry(lambda: self._store.remove_interaction(video.id, change.event_id))
        newest = await call_with_retry(lambda: self._store.get(video.id))
        if newest is not None:
            _check_takes_changes(newest)  # it may have ended in between, which says more
        if refusal.code == "session_over":
            raise Problem(409, "video_over", "the last chunk is made: it takes no changes any more")
        raise refused(refusal)

    def _session(self, video: VideoRecord) -> ReplicaSession:
        """The video's session at the replica that holds it."""
        return ReplicaSession(self._fleet.replicas(video), video)


def _check_takes_changes(video: VideoRecord) -> None:
    """`Problem` 409 when no chunk is left that a change could show in."""
    if video.status.over or video.whole:
        state = video.status.value if video.status.over else "drawn to its end"
        raise Problem(409, "video_over", f"the video is {state}: it takes no changes any more")
