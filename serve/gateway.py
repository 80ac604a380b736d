"""The gateway's part between routes and actors: it keeps no state that another gateway would need."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from diagonal.metrics import MetricSink
from serve.driver import Driver
from serve.problems import Problem, not_found, refused
from serve.records import Interaction, ModelInfo, Opened, Refused, Segment, Status, VideoRecord
from serve.router import address
from serve.schemas import InteractionRequest, VideoRequest, checked_prompt, new_video
from serve.settings import ServeSettings

T = TypeVar("T")
_CALL_TIMEOUT_S = 30.0
_READY_TIMEOUT_S = 5.0
_SEGMENT_WAIT_S = 5.0
_PART_BYTES = 1 << 20


class BrokenStreamError(Exception):
    """A video failed while it was read: the response is cut, so that nobody takes it for the whole."""


class Gateway:
    """What the routes do. `store` and `replica` are Serve handles."""

    def __init__(self, settings: ServeSettings, store: Any, replica: Any, metrics: MetricSink) -> None:
        self._settings, self._store, self._replica, self._metrics = settings, store, replica, metrics
        self._model: ModelInfo | None = None
        self._drivers: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def model(self) -> ModelInfo:
        """What the replicas serve; asked for once."""
        if self._model is None:
            self._model = await _answer(self._replica.describe.remote())
        return self._model

    async def check_ready(self) -> None:
        """`Problem` 503 unless the store and a replica with a running engine answer."""
        try:
            ready = [await _answer(part.ready.remote(), _READY_TIMEOUT_S) for part in (self._store, self._replica)]
        except (RayError, RayServeException, TimeoutError):
            ready = [False]
        if not all(ready):
            raise Problem(503, "not_ready", "the service is not ready", retry_after_s=1.0)

    async def create(self, request: VideoRequest) -> VideoRecord:
        """Admit a video: a replica holds its session before this answers, and a driver makes it."""
        video = new_video(request, await self.model(), time.time())
        return await asyncio.shield(_apart(self._admit(video)))  # a caller who goes away leaves nothing half made

    async def _admit(self, video: VideoRecord) -> VideoRecord:
        replica = self._replica.options(session_id=address("", video.id))
        opened: Opened | Refused = await _answer(
            replica.open.remote(video.id, video.prompt, video.seed, video.frames, video.scale)
        )
        if isinstance(opened, Refused):
            raise refused(opened)
        video = replace(video, replica=opened.replica, mime=opened.mime)
        try:
            await _answer(self._store.create.remote(video, opened.init))
        except (RayError, RayServeException, TimeoutError):
            await self._at(video).close.remote(video.id, "cancelled")
            raise
        self._start_driver(video)
        return video

    async def get(self, video_id: str) -> VideoRecord:
        """The video; whoever asks for one that nobody drives drives it."""
        video: VideoRecord | None = await _answer(self._store.get.remote(video_id))
        if video is None:
            raise not_found(video_id)
        if video.orphan:
            await self._adopt(video)
        return video

    async def newest(self, limit: int, after: str | None, ascending: bool) -> list[VideoRecord]:
        return list(await _answer(self._store.list.remote(limit, after, ascending)))

    async def delete(self, video_id: str) -> None:
        """Cancel the video if it is not over, free its cache, and remove it."""
        video: VideoRecord | None = await _answer(self._store.delete.remote(video_id))
        if video is None:
            raise not_found(video_id)
        if not video.status.over:
            await _answer(self._at(video).close.remote(video_id, "cancelled"))

    async def interact(self, video_id: str, request: InteractionRequest) -> str:
        """Change the prompt at the next chunk; returns the event's id. The same event again is a retry."""
        prompt = checked_prompt(request.interaction.event.prompt, await self.model(), "interaction.event.prompt")
        video = await self.get(video_id)
        if video.status.over:
            raise Problem(409, "video_over", f"the video is {video.status.value}: its prompt cannot be changed")
        change = Interaction(request.interaction.event_id, prompt, request.interaction.transition_chunks)
        known: Interaction | None = await _answer(self._store.add_interaction.remote(video_id, change))
        if known is None:
            await self._apply(video, change)
        elif (known.prompt, known.transition_chunks) != (change.prompt, change.transition_chunks):
            message = f"event {change.event_id!r} is already there, with other content"
            raise Problem(409, "event_id_conflict", message, param="interaction.event_id")
        return change.event_id

    async def content(self, video_id: str) -> tuple[int, AsyncIterator[bytes]]:
        """Size and bytes of the finished file."""
        video = await self.get(video_id)
        if video.status is not Status.COMPLETED:
            message = f"the video is {video.status.value}, {video.frames_done} of {video.frames} frames are there"
            raise Problem(409, "video_not_ready", message, param="video_id")
        first = await _answer(self._store.content.remote(video_id, 0, _PART_BYTES))
        if first is None:
            raise Problem(404, "content_gone", "the file is no longer there", param="video_id")
        return first[0], self._parts(video_id, *first)

    async def stream(self, video_id: str, start_chunk: int) -> AsyncIterator[bytes]:
        """The initialisation segment, then every chunk from `start_chunk` on, each as soon as it is there."""
        accepted_s = time.monotonic()
        video = await self.get(video_id)
        waited_from_s = accepted_s if video.chunks_done else accepted_s - max(0.0, time.time() - video.created_at)
        return self._segments(video, start_chunk, waited_from_s)

    async def close(self) -> None:
        """This gateway goes away; other gateways take its videos over."""
        tasks = [*self._drivers.values(), *self._leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _segments(self, video: VideoRecord, chunk: int, waited_from_s: float) -> AsyncIterator[bytes]:
        reader = secrets.token_hex(8)
        try:
            init = await self._segment(video.id, reader, -1)
            if init is None or init.data is None:
                return
            yield init.data
            sent_s: float | None = None
            while (segment := await self._segment(video.id, reader, chunk)) is not None:
                if segment.data is not None:
                    sent_s = self._report_sent(segment, video.fps, waited_from_s, sent_s)
                    yield segment.data
                    chunk += 1
                elif segment.status is Status.FAILED:
                    raise BrokenStreamError(video.id)
                elif segment.status.over:
                    return
        finally:
            task = _apart(self._leave(video.id, reader))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _segment(self, video_id: str, reader: str, chunk: int) -> Segment | None:
        """A chunk, or news that there will be none; waits as long as it takes."""
        while True:
            waiting = self._store.segment.remote(video_id, reader, chunk, _SEGMENT_WAIT_S)
            segment: Segment | None = await _answer(waiting, _SEGMENT_WAIT_S + _CALL_TIMEOUT_S)
            if segment is None or segment.data is not None or segment.status.over:
                return segment
            if segment.orphan:
                await self.get(video_id)

    def _report_sent(self, segment: Segment, fps: int, waited_from_s: float, sent_s: float | None) -> float:
        now_s = time.monotonic()
        if sent_s is None:
            self._metrics.observe("diagonal_time_to_first_frame_seconds", now_s - waited_from_s)
        else:
            self._metrics.observe("diagonal_chunk_interval_seconds", now_s - sent_s)
        self._metrics.inc("diagonal_frames_sent_total", segment.frames)
        self._metrics.inc("diagonal_stream_media_seconds_total", segment.frames / fps)
        return now_s

    async def _leave(self, video_id: str, reader: str) -> None:
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # the store forgets silent readers
            await _answer(self._store.leave.remote(video_id, reader))

    async def _parts(self, video_id: str, size: int, part: bytes) -> AsyncIterator[bytes]:
        sent = 0
        while True:
            yield part
            sent += len(part)
            if sent >= size:
                return
            following = await _answer(self._store.content.remote(video_id, sent, sent + _PART_BYTES))
            if following is None or not following[1]:
                raise BrokenStreamError(video_id)
            part = following[1]

    async def _apply(self, video: VideoRecord, change: Interaction) -> None:
        try:
            answer: Refused | None = await _answer(
                self._at(video).interact.remote(video.id, change.event_id, change.prompt, change.transition_chunks)
            )
        except (RayError, RayServeException, TimeoutError):
            answer = Refused("session_lost", "the replica that held the session is gone")
        if answer is not None:
            await _answer(self._store.remove_interaction.remote(video.id, change.event_id))
            raise refused(answer)

    async def _adopt(self, video: VideoRecord) -> None:
        if await _answer(self._store.claim.remote(video.id, video.epoch)):
            self._start_driver(replace(video, epoch=video.epoch + 1))

    def _start_driver(self, video: VideoRecord) -> None:
        model = self._model
        lead_s = model.lead_s if model else 1.0
        driver = Driver(
            video, self._store, self._replica, self._metrics, lead_s, self._settings.reader_start_timeout_s
        )
        task = _apart(driver.run())
        self._drivers[video.id] = task
        task.add_done_callback(lambda _: self._drivers.pop(video.id, None))

    def _at(self, video: VideoRecord) -> Any:
        """The handle of the replica that holds the video's session."""
        return self._replica.options(session_id=address(video.replica, video.id))


def _apart(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Work that outlives the request that began it: Serve cancels a request's own calls when its caller goes away."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


async def _answer(response: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
    return await asyncio.wait_for(response, timeout_s)
