"""Brings one video from its replica to the store: one unary pull a chunk, paced by who watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from diagonal.metrics import MetricSink
from serve.calls import answer, patient
from serve.pacing import PlaybackClock
from serve.problems import SILENCES
from serve.records import EncodedChunk, Pacing, Refused, Status, Verdict, VideoRecord
from serve.router import address

_LOG = logging.getLogger("ray.serve")
_LOOK_EVERY_S = 0.25  # how soon a driver that waits sees that its last reader left
_PULL_TIMEOUT_S = 120.0
_LOOK_AT_POSITION_S = 0.05  # the same for one that follows a viewer's own player


class Driver:
    """Drives one video, from the chunk that the store waits for, until it is over or another driver took it."""

    def __init__(
        self, video: VideoRecord, store: Any, replica: Any, metrics: MetricSink, lead_s: float, start_timeout_s: float
    ) -> None:
        self._video, self._store, self._metrics = video, store, metrics
        self._replica = replica.options(session_id=address(video.replica, video.id))
        self._clock = PlaybackClock(lead_s, time.monotonic)
        self._start_by = time.monotonic() + start_timeout_s
        self._paced = video.pacing is Pacing.REALTIME
        self._live = self._paced or bool(video.resume_hash)  # ends when nobody watches
        self._ahead = 0 if self._paced else 1

    async def run(self) -> None:
        """Until the end. When this task is cancelled the video is left for another driver."""
        try:
            outcome = await self._drive()
        except SILENCES as error:
            _LOG.warning("video %s: %s", self._video.id, type(error).__name__)
            outcome = "failed"
            with contextlib.suppress(*SILENCES):
                await self._fail("session_lost", "the part of the service that held the session is gone")
        if outcome is not None:
            with contextlib.suppress(*SILENCES):  # then there is nothing to free
                await answer(self._replica.close.remote(self._video.id, outcome))

    async def _drive(self) -> str | None:
        """How the session ended; None when another driver has it."""
        chunk, media_s = self._video.chunks_done, self._video.frames_done / self._video.fps
        while not self._video.whole:
            verdict = await self._wait_for_turn(media_s)
            if not verdict.go:
                return None if verdict.superseded else "cancelled"
            made = await answer(self._replica.pull.remote(self._video.id, chunk, self._ahead), _PULL_TIMEOUT_S)
            if isinstance(made, Refused):
                return await self._fail(made.code, made.message)
            if not await self._keep(made, media_s):
                return None if (await self._check()).superseded else "cancelled"
            if made.last:
                return "completed"
            chunk, media_s = chunk + 1, media_s + made.frames / self._video.fps
        await patient(lambda: self._store.complete.remote(self._video.id))
        return "completed"

    async def _keep(self, made: EncodedChunk, media_s: float) -> bool:
        """Whether the store has the chunk, by this call or by one whose answer was lost."""
        stalled_s = self._clock.arrived(media_s)
        if stalled_s:
            self._metrics.inc("diagonal_stream_stalls_total")
            self._metrics.inc("diagonal_stream_stall_seconds_total", stalled_s)
        kept = await patient(lambda: self._store.put_chunk.remote(self._video.id, self._video.epoch, made))
        return bool(kept)

    async def _wait_for_turn(self, media_s: float) -> Verdict:
        """Wait until the next chunk may be made, or the video is no longer wanted."""
        while True:
            verdict = await self._check()
            if not verdict.go or not self._live:
                return verdict
            if verdict.readers:
                self._clock.start()
            elif not verdict.returning and (verdict.had_reader or time.monotonic() > self._start_by):
                await self._end(Status.CANCELLED, "abandoned", "nobody watches it any more")
                return Verdict(go=False)
            wait_s = self._wait_s(verdict, media_s)
            if wait_s == 0:
                return verdict
            await asyncio.sleep(min(wait_s, _LOOK_EVERY_S))

    async def _check(self) -> Verdict:
        verdict: Verdict = await patient(lambda: self._store.check.remote(self._video.id, self._video.epoch))
        return verdict

    def _wait_s(self, verdict: Verdict, media_s: float) -> float:
        """How long until the next chunk may be made, by the viewer's own player or by a clock that stands for it."""
        if not verdict.readers and verdict.had_reader:
            return _LOOK_EVERY_S  # nobody watches until he who lost his connection is back
        if verdict.position_s is None and not self._paced:
            return 0.0
        if verdict.position_s is None:
            wait_s, ahead_s = self._clock.wait_s(media_s), media_s - self._clock.position_s()
        else:
            ahead_s = media_s - verdict.position_s
            wait_s = 0.0 if ahead_s < (verdict.window_s or 0.0) else _LOOK_AT_POSITION_S
        if wait_s == 0:
            self._metrics.observe("diagonal_send_window_media_seconds", max(0.0, ahead_s))
        return wait_s

    async def _fail(self, code: str, message: str) -> str:
        await self._end(Status.FAILED, code, message)
        return "failed"

    async def _end(self, status: Status, code: str, message: str) -> None:
        await patient(lambda: self._store.end.remote(self._video.id, status, code, message))
