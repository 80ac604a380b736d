"""The gateway's part between routes and actors: it keeps no state that another gateway would need."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, NoReturn

from diagonal.chain import Link
from diagonal.metrics import MetricsBackend
from serve.gateway.drivers import Drivers
from serve.gateway.failover import opening
from serve.gateway.fleet import Fleet
from serve.gateway.prompt_policy import PromptPolicy
from serve.gateway.reader import BrokenStreamError, ChunkReader
from serve.gateway.replica_session import Holder
from serve.gateway.requests import asked_change, new_video, new_video_id
from serve.policies.load_shedding import RecentRefusals
from serve.policies.routing import address
from serve.records import (
    KEPT_CHUNKS,
    LOCAL,
    LOCAL_CALLER,
    Caller,
    Idempotency,
    Interaction,
    InteractionKind,
    ModelInfo,
    Opened,
    Provenance,
    Refused,
    Status,
    Usage,
    VideoRecord,
)
from serve.rpc import UNAVAILABLE, answer, apart, patient
from serve.settings import ServeSettings
from serve.tokens import CLIENT_SECRET_S, Secret
from serve.tracing import traces_of
from serve.wire.problems import Problem, not_found, refused, wrong_value
from serve.wire.schemas import InteractionRequest, VideoRequest

_READY_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 0.2
_PART_BYTES = 1 << 20


class Gateway:
    """What the routes do. `store` is a Serve handle, `fleet` holds those of the releases."""

    def __init__(
        self,
        settings: ServeSettings,
        store: Any,
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
        self._upkeep = [apart(self._drivers.look_after_orphans()), apart(self._watch_for_stop())]

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
            self._provenance = await answer(self._store.provenance.remote())
        return self._provenance

    async def chain(self, video_id: str, caller: Caller, start: int, limit: int) -> tuple[VideoRecord, list[Link]]:
        """The caller's video, and its chain from chunk `start` on, at most `limit` links."""
        video = await self.get(video_id, caller)
        return video, list(await answer(self._store.links.remote(video_id, start, limit)))

    async def recording(self, video_id: str, caller: Caller) -> str:
        """The log of the caller's video, as far as it is made, from which it can be made again."""
        video = await self.get(video_id, caller)
        if not video.record:
            raise Problem(404, "no_recording", "the video was not asked for with extra.record", param="video_id")
        running = None if video.status.over else await Holder(self._fleet.handle(video), video).recording()
        text = running or await answer(self._store.recording.remote(video_id))
        if text is None:
            raise Problem(404, "recording_gone", "the part of the service that kept the log is gone", param="video_id")
        return str(text)

    def count_error(self, code: str) -> None:
        """Count an error that was told, by its code."""
        self._metrics.inc("diagonal_errors_total", code=code)

    async def check_ready(self) -> None:
        """`Problem` 503 unless the store and a replica with a running engine answer, and this gateway stays."""
        if self._draining.is_set():
            raise Problem(503, "draining", "this gateway is about to end; another one goes on", retry_after_s=1.0)
        try:
            ready = await answer(self._store.ready.remote(), _READY_TIMEOUT_S) and await self._fleet.ready()
        except UNAVAILABLE:
            ready = False
        if not ready:
            raise Problem(503, "not_ready", "the service is not ready", retry_after_s=1.0)

    async def caller(self, shown: Secret) -> Caller | None:
        """Whose key this is."""
        found: Caller | None = await answer(self._store.caller.remote(shown))
        return found

    async def redeem(self, shown: Secret) -> Caller | None:
        """Use a client secret up: who made it."""
        key_id = await answer(self._store.redeem.remote(shown))
        if key_id is None or key_id == LOCAL:
            return LOCAL_CALLER if key_id == LOCAL else None
        found: Caller | None = await answer(self._store.caller_of.remote(key_id))
        return found

    async def create_client_secret(self, caller: Caller, seconds: float = CLIENT_SECRET_S) -> tuple[str, float]:
        """A secret with which a browser opens one session in the caller's name, and when it ends."""
        text, expires_at = await answer(self._store.create_client_secret.remote(caller.key_id, seconds))
        return str(text), float(expires_at)

    async def create(
        self,
        request: VideoRequest,
        caller: Caller,
        idempotency: Idempotency | None = None,
        resume_hash: str = "",
        traceparent: str = "",
    ) -> VideoRecord:
        """Admit a video: a replica holds its session before this answers, and a driver makes it.

        `traceparent` names the caller's own span.
        """
        with self._traces.span("create_video", traceparent) as span:
            return await self._create(request, caller, idempotency, resume_hash, span)

    async def _create(
        self, request: VideoRequest, caller: Caller, idempotency: Idempotency | None, resume_hash: str, span: str
    ) -> VideoRecord:
        began_s, video_id = time.monotonic(), new_video_id()
        info = await self._fleet.choose(video_id, request.model)
        video = new_video(request, info, time.time(), video_id)
        await self._policy.check(video.prompt, caller.account)
        video = replace(video, owner=caller.key_id, account=caller.account, resume_hash=resume_hash, traceparent=span)
        if idempotency is None and (full := self._refusals.of(video)):  # a repeated request may be of a known video
            raise self._rejected(full, "full_lately")
        try:
            if idempotency is None and self._refusals.lately(video):
                await self._check_room(video)
            # A caller who goes away leaves nothing half made.
            made = await asyncio.shield(apart(self._admit(video, caller, idempotency)))
        finally:
            self._refusals.answered(video)
        return replace(made, age_s=time.monotonic() - began_s)

    async def _check_room(self, video: VideoRecord) -> None:
        """Refuse at once what a replica would refuse: nothing is written for it, and nothing to be withdrawn."""
        asked = (video.id, video.prompt, video.seed, video.frames or None, video.live)
        if full := await answer(self._fleet.handle(video).room.remote(*asked)):
            self._refuse(video, full)

    async def _admit(self, video: VideoRecord, caller: Caller, idempotency: Idempotency | None) -> VideoRecord:
        with self._traces.span("admission", video.traceparent, model=video.model):
            return await self._admitted(video, caller, idempotency)

    async def _admitted(self, video: VideoRecord, caller: Caller, idempotency: Idempotency | None) -> VideoRecord:
        known: VideoRecord | Refused | None = await answer(self._store.admit.remote(video, caller, idempotency))
        if isinstance(known, VideoRecord):
            return known
        if isinstance(known, Refused):
            raise self._rejected(known, "quota")
        try:
            opened = await self._open(video)
        except (Problem, *UNAVAILABLE):
            await patient(lambda: self._store.withdraw.remote(video, caller))
            raise
        video = replace(video, status=Status.IN_PROGRESS, replica=opened.replica, mime=opened.mime)
        try:
            kept = await answer(self._store.opened.remote(video.id, opened.replica, opened.mime, opened.init))
        except UNAVAILABLE:
            await self._at(video).close.remote(video.id, "cancelled")
            with contextlib.suppress(*UNAVAILABLE):  # then it counts until the store's upkeep ends it
                await answer(self._store.withdraw.remote(video, caller))
            raise
        if not kept:
            await self._at(video).close.remote(video.id, "cancelled")
            raise not_found(video.id)
        self._drivers.start(video)
        return video

    async def _open(self, video: VideoRecord) -> Opened:
        replica = self._fleet.handle(video).options(session_id=address("", video.id))
        opened: Opened | Refused = await answer(replica.open.remote(*opening(video)))
        if isinstance(opened, Refused):
            self._refuse(video, opened)
        return opened

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
        video: VideoRecord | None = await answer(self._store.get.remote(video_id))
        if video is None or video.owner != caller.key_id:
            raise not_found(video_id)
        if video.orphan:
            await self._drivers.adopt(video)
        return video

    async def newest(self, caller: Caller, limit: int, after: str | None, ascending: bool) -> list[VideoRecord]:
        return list(await answer(self._store.newest.remote(caller.key_id, limit, after, ascending)))

    async def delete(self, video_id: str, caller: Caller) -> None:
        """Cancel the caller's video if it is not over, free its cache, and remove it."""
        video: VideoRecord | None = await answer(self._store.delete.remote(video_id, caller.key_id))
        if video is None:
            raise not_found(video_id)
        if not video.status.over:
            await answer(self._at(video).close.remote(video_id, "cancelled"))

    async def interact(self, video_id: str, request: InteractionRequest, caller: Caller) -> str:
        """Change the prompt, pause or go on at the next chunk; returns the event's id. The same one is a retry."""
        video = await self.get(video_id, caller)
        change = asked_change(request, await self._fleet.info_of(video))
        earlier = next((one for one in video.interactions if one.event_id == change.event_id), None)
        if earlier is None:
            _check_takes_changes(video)
            if change.kind is InteractionKind.PROMPT:
                await self._policy.check(change.prompt, caller.account, "interaction.event.prompt")
            earlier = await answer(self._store.add_interaction.remote(video_id, change))
        if earlier is True:
            await self._apply(video, change)
        elif earlier is False:
            raise Problem(429, "too_many_interactions", "too many prompt changes wait", retry_after_s=1.0)
        elif not change.says_the_same(earlier):
            message = f"event {change.event_id!r} is already there, with other content"
            raise Problem(409, "event_id_conflict", message, param="interaction.event_id")
        return change.event_id

    async def usage(self, caller: Caller) -> Usage | None:
        """What the caller's account used of its quotas; None without quotas, or when the store does not answer."""
        if not (caller.sessions or caller.frames_per_minute):
            return None
        try:
            usage: Usage = await answer(self._store.usage.remote(caller))
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
        found: tuple[int, bytes] | None = await answer(self._store.content.remote(video_id, 0, 0))
        if found is None:
            raise Problem(404, "content_gone", "the file is no longer there", param="video_id")
        return found[0]

    async def content(self, video_id: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes of the finished file; `BrokenStreamError` when it is removed meanwhile."""
        while start < stop:
            part = await answer(self._store.content.remote(video_id, start, min(stop, start + _PART_BYTES)))
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

    def reader(self, video: VideoRecord, name: str = "", resumed: bool = False) -> ChunkReader:
        """A way through the video for one connection, or for one that goes on after a break; `leave_later` ends it."""
        return ChunkReader(
            video, self._store, lambda: self._drivers.adopt_if_orphan(video.id), self._metrics, name, resumed
        )

    def leave_later(self, reader: ChunkReader, return_s: float = 0.0) -> None:
        """Say that the connection is gone, even though its task is being cancelled."""
        task = apart(reader.leave(return_s))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def take_over(self, caller: Caller, old_hash: str, new_hash: str) -> VideoRecord | None:
        """The video of a resume token, whose only reader its holder now is; None when the token does not count."""
        taken: VideoRecord | None = await answer(self._store.take_over.remote(caller.key_id, old_hash, new_hash))
        if taken is not None and not taken.status.over and taken.id not in self._drivers:
            await self._drivers.adopt(taken)  # its gateway may be gone: a driver that is still there gives way
        return taken

    async def cancel(self, video: VideoRecord, code: str, message: str) -> None:
        """End the video where it is, and free its session within a chunk."""
        if await patient(lambda: self._store.end.remote(video.id, Status.CANCELLED, code, message)):
            if video.record and (text := await Holder(self._fleet.handle(video), video).recording()):
                await answer(self._store.put_recording.remote(video.id, text))
            await answer(self._at(video).close.remote(video.id, "cancelled"))

    async def close(self) -> None:
        """This gateway goes away; other gateways take its videos over."""
        for task in self._upkeep:
            task.cancel()
        await self._drivers.let_go()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._upkeep, *self._leaving, return_exceptions=True)

    async def _segments(self, reader: ChunkReader, chunk: int) -> AsyncIterator[bytes]:
        try:
            async for data in reader.segments(chunk):
                yield data
        finally:
            self.leave_later(reader)

    async def _apply(self, video: VideoRecord, change: Interaction) -> None:
        """Tell the replica. One that is gone is replaced by the session's driver, which tells the next one."""
        try:
            refusal = await self._tell_replica(video, change)
        except UNAVAILABLE:
            refusal = None
        if refusal is not None and refusal.code == "session_lost":
            refusal = None
        if refusal is None and change.kind is not InteractionKind.PROMPT:
            pause = change.kind is InteractionKind.PAUSE
            await patient(lambda: self._store.set_paused.remote(video.id, change.event_id, pause))
        if refusal is not None:
            await patient(lambda: self._store.remove_interaction.remote(video.id, change.event_id))
            now: VideoRecord | None = await patient(lambda: self._store.get.remote(video.id))
            if now is not None:
                _check_takes_changes(now)  # it may have ended in between, which says more
            if refusal.code == "session_over":
                raise Problem(409, "video_over", "the last chunk is made: it takes no changes any more")
            raise refused(refusal)

    async def _tell_replica(self, video: VideoRecord, change: Interaction) -> Refused | None:
        replica = self._at(video)
        if change.kind is InteractionKind.PROMPT:
            tell = replica.interact.remote(video.id, change.event_id, change.prompt, change.transition_chunks)
        else:
            tell = (replica.pause if change.kind is InteractionKind.PAUSE else replica.resume).remote(video.id)
        told: Refused | None = await answer(tell)
        return told

    def _at(self, video: VideoRecord) -> Any:
        """The handle of the replica that holds the video's session."""
        return self._fleet.handle(video).options(session_id=address(video.replica, video.id))


def _check_takes_changes(video: VideoRecord) -> None:
    """`Problem` 409 when no chunk is left that a change could show in."""
    if video.status.over or video.whole:
        state = video.status.value if video.status.over else "drawn to its end"
        raise Problem(409, "video_over", f"the video is {state}: it takes no changes any more")
