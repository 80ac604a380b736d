"""Brings one video from its replica to the store: one unary pull a chunk, paced by who watches.

Where nobody paces it a pull brings every chunk that is there: when the others are slower than the engine, that is
several, and what a call costs is shared among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace

from diagonal.metrics import MetricsBackend
from serve.actors import Replicas, StoreApi
from serve.gateway.failover import PATIENCE_S, UNWATCHED_PATIENCE_S, rehome
from serve.gateway.replica_session import GONE, ReplicaSession
from serve.policies.pacing import PlaybackClock
from serve.records import DriveDecision, EncodedChunk, Pacing, PutChunks, Refused, Status, VideoRecord
from serve.rpc import UNAVAILABLE, call, call_with_retry

_LOG = logging.getLogger("ray.serve")
_SECOND_AHEAD_S = 0.4  # of media left to a viewer when his second chunk is asked for: others' first ones come first
_LOOK_EVERY_S = 0.75  # how soon a driver that waits sees that its last reader left
LOOK_AT_HOLDER_S = 1.0  # and that its replica drains or is gone, where no pull has shown of late that it is there
_BEAT_S = 0.8  # how often the store hears of a driver at least, whatever it waits for
_AHEAD = 8  # chunks that are begun behind the one that is waited for, where nobody paces them: the engine never idles
_WHOLE_SNAPSHOT_EVERY = 8  # between them only what a chunk adds is kept
_AWAY_S = 0.5  # a store that needs longer for an answer was away
_RELEASE_S = 2.0
_DEATHS = 3
_MOVES = ("session_lost", "chunk_gone", "replica_unwell")  # another replica can go on from there
_LOOK_AT_POSITION_S = 0.05  # how soon it sees that a viewer's own player has come as far as is waited for


class Driver:
    """Drives one video, from the chunk that the store waits for, until it is over or another driver took it."""

    def __init__(
        self,
        video: VideoRecord,
        store: StoreApi,
        replicas: Replicas,
        metrics: MetricsBackend,
        lead_s: float,
        start_timeout_s: float,
    ) -> None:
        self._store, self._metrics, self._replicas = store, metrics, replicas
        self._clock = PlaybackClock(lead_s, time.monotonic)
        self._start_timeout_s = start_timeout_s
        self._unwatched_s = self._checked_s = time.monotonic()
        self._paced = video.pacing is Pacing.REALTIME
        self._chunk, self._media_s = video.chunks_done, video.frames_done / video.fps
        self._from_s = self._media_s  # who watched before another gateway went has nothing left to play
        self._died_at, self._deaths = -1, 0
        self._told: DriveDecision | None = None  # by the store, when it took the newest chunk
        self._held_by(video)
        self._held = video.epoch > 0  # the replica was told to pause, or another driver may have done so

    def _held_by(self, video: VideoRecord) -> None:
        """The session is at the video's replica now."""
        self._video, self._session = video, ReplicaSession(self._replicas, video)
        self._saved_chunk = self._whole_chunk = -1  # the newest ones with a (whole) snapshot in the store, from here
        self._lost, self._looked_s = False, time.monotonic()

    async def run(self) -> None:
        """Until the end. When this task is cancelled the video is left for another driver, which may come at once."""
        beat = asyncio.ensure_future(self._beat())
        try:
            outcome = await self._drive()
        except UNAVAILABLE as error:
            _LOG.warning("video %s: %s", self._video.id, type(error).__name__)
            outcome = "failed"
            with contextlib.suppress(*UNAVAILABLE):
                await self._fail(GONE.code, GONE.message)
        except asyncio.CancelledError:
            beat.cancel()
            with contextlib.suppress(*UNAVAILABLE):
                await call(self._store.release(self._video.id, self._video.epoch), _RELEASE_S)
            raise
        finally:
            beat.cancel()
        if outcome is not None:
            if outcome != "completed":
                await self._save_recording()
            await self._session.close(outcome)

    async def _save_recording(self) -> None:
        """Keep the log of a session that is recorded, as far as it went, before its replica forgets it."""
        if self._video.record and (text := await self._session.recording()):
            with contextlib.suppress(*UNAVAILABLE):
                await call(self._store.put_recording(self._video.id, text))

    async def _drive(self) -> str | None:
        """How the session ended; None when another driver has it."""
        while not self._video.whole:
            verdict = await self._wait_for_turn()
            if not verdict.go:
                return None if verdict.superseded else "cancelled"
            made = await self._pull(verdict)
            if isinstance(made, Refused):
                if made.code not in _MOVES:
                    return await self._fail(made.code, made.message)
                if self._is_deadly(made):
                    return await self._fail("generation_failed", f"{_DEATHS} replicas were lost in one chunk of it")
                if not await self._move(made, verdict):
                    return None
            elif made is not None:
                if not await self._keep(made):
                    return None if (await self._check()).superseded else "cancelled"
                if made[-1].last:
                    return "completed"
        await call_with_retry(lambda: self._store.complete(self._video.id))
        return "completed"

    def _is_deadly(self, why: Refused) -> bool:
        """Whether so many replicas fell silent or ill over one chunk that the next one is not to get it."""
        if why is GONE and not self._lost or why.code == "replica_unwell":
            self._deaths = self._deaths + 1 if self._died_at == self._chunk else 1
            self._died_at = self._chunk
        return self._died_at == self._chunk and self._deaths >= _DEATHS

    async def _pull(self, verdict: DriveDecision) -> tuple[EncodedChunk, ...] | Refused | None:
        """The next chunks, with what another replica needs to go on after them; None when none is there yet.

        The first one comes alone and without: somebody waits for it, and a session that is lost before its second chunk
        begins again from its seed.
        """
        if self._lost:
            return GONE
        ahead = 0 if self._paced or verdict.position_s is not None else _AHEAD
        if self._chunk == 0:
            made = await self._session.pull(0, ahead)
            return made[:1] if isinstance(made, tuple) else made
        return await self._session.pull(self._chunk, ahead, -1 if self._wants_whole() else self._saved_chunk)

    def _wants_whole(self) -> bool:
        """Whether the next snapshot is to be a whole one."""
        return self._saved_chunk < 0 or self._chunk - self._whole_chunk >= _WHOLE_SNAPSHOT_EVERY

    async def _move(self, why: Refused, verdict: DriveDecision) -> bool:
        """Take the session up on another replica; False when it is over, lost, or somebody else's."""
        if not (await self._check()).go:
            return True  # the next look says how it ended
        if why.code == "chunk_gone":
            await self._session.close("moved")
        watched = self._video.live or verdict.readers
        ahead_s = self._media_s - self._clock.position_s()
        patience_s = PATIENCE_S if watched else UNWATCHED_PATIENCE_S
        video = replace(self._video, chunks_done=self._chunk)
        moved = await rehome(video, self._store, self._replicas, ahead_s, patience_s)
        self._count_move("replica_silent" if why is GONE and not self._lost else why.code, moved)
        if isinstance(moved, VideoRecord):
            self._held_by(moved)
            self._held = False
            return True
        if moved is not None:
            _LOG.error("video %s finds no other replica: %s", self._video.id, moved.code)
            await self._fail(GONE.code, GONE.message)
        return False

    def _count_move(self, cause: str, moved: VideoRecord | Refused | None) -> None:
        outcome = "moved" if isinstance(moved, VideoRecord) else "superseded" if moved is None else "failed"
        self._metrics.inc("diagonal_session_migrations_total", cause=cause, outcome=outcome)

    async def _keep(self, made: tuple[EncodedChunk, ...]) -> bool:
        """Whether the store has the chunks, and with them what another replica needs to go on after the newest."""
        stalled_s = self._clock.arrived(self._media_s)
        if stalled_s:
            self._metrics.inc("diagonal_stream_stalls_total")
            self._metrics.inc("diagonal_stream_stall_seconds_total", stalled_s)
        newest, snapshot = made[-1], made[-1].snapshot
        if newest.last:
            await self._save_recording()
        whole = bool(snapshot) and self._wants_whole()
        chunks = (*made[:-1], replace(newest, snapshot=b""))
        request = PutChunks(self._video.id, self._video.epoch, chunks, snapshot, whole)
        began_s = time.monotonic()
        self._told = await call_with_retry(lambda: self._store.put_chunks(request))
        self._metrics.observe("diagonal_store_write_seconds", time.monotonic() - began_s)
        if self._told is None:
            return False
        self._note_watched(self._told, began_s)
        self._checked_s = self._looked_s = time.monotonic()  # store and replica both answered
        self._saved_chunk = newest.chunk if snapshot else -1
        self._whole_chunk = newest.chunk if whole else self._whole_chunk
        self._chunk = newest.chunk + 1
        self._media_s += sum(chunk.frames for chunk in made) / self._video.fps
        return True

    async def _wait_for_turn(self) -> DriveDecision:
        """Wait until the next chunk may be made, or the video is no longer wanted."""
        while True:
            verdict, self._told = self._told or await self._check(), None
            if not verdict.go:
                return verdict
            if self._video.live and not verdict.readers and not verdict.returning and self._given_up(verdict):
                await self._end(Status.CANCELLED, "abandoned", "nobody watches it any more")
                return DriveDecision(go=False)
            if verdict.readers:
                self._clock.start(self._from_s)
            await self._hold(verdict.paused or (self._video.live and verdict.returning))
            wait_s = _LOOK_EVERY_S if self._held else self._wait_s(verdict)
            if wait_s == 0 or await self._look_at_holder():
                return verdict
            await asyncio.sleep(min(wait_s, _LOOK_EVERY_S))

    async def _look_at_holder(self) -> bool:
        """Whether the session is to be moved at once; asked now and then. That of one that waits can wait, too."""
        now_s = time.monotonic()
        if self._held or now_s - self._looked_s < LOOK_AT_HOLDER_S:
            return False
        self._looked_s = now_s
        self._lost = await self._session.lost()
        return self._lost

    def _given_up(self, verdict: DriveDecision) -> bool:
        """Whether its readers left, or none came for long: a store that restarts forgets them until they ask again."""
        return verdict.had_reader or time.monotonic() - self._unwatched_s > self._start_timeout_s

    async def _hold(self, wanted: bool) -> None:
        """Free the session's cache while its viewer wants no chunks, and go on when he does and there is room.

        A replica is told again what a gateway or another driver told it before; it then has nothing to do.
        """
        if wanted and not self._held:
            self._clock.pause()
            self._held = True
            await self._session.pause()
        elif self._held and not wanted and await self._may_resume():
            self._clock.resume()
            self._held = False

    async def _may_resume(self) -> bool:
        """Whether there is room for the session again; a replica that lost it says so at the next pull."""
        refused = await self._session.resume()
        return refused is None or refused.retry_after_s is None

    async def _beat(self) -> None:
        """Let the store hear of this driver while a call takes long."""
        while True:
            await asyncio.sleep(max(0.0, self._checked_s + _BEAT_S - time.monotonic()))
            self._checked_s = time.monotonic()
            with contextlib.suppress(*UNAVAILABLE):
                await call(self._store.check(self._video.id, self._video.epoch))

    async def _check(self) -> DriveDecision:
        self._checked_s = asked_s = time.monotonic()
        verdict = await call_with_retry(lambda: self._store.check(self._video.id, self._video.epoch))
        self._note_watched(verdict, asked_s)
        return verdict

    def _note_watched(self, verdict: DriveDecision, asked_s: float) -> None:
        """Since when nobody watches, as far as one can know: a store that was away may have forgotten readers."""
        now_s = time.monotonic()
        if verdict.readers or now_s - asked_s > _AWAY_S:
            self._unwatched_s = now_s

    def _wait_s(self, verdict: DriveDecision) -> float:
        """How long until the next chunk may be made, by the viewer's own player or by a clock that stands for it."""
        if verdict.position_s is not None:
            ahead_s = self._media_s - verdict.position_s
            beyond_s = ahead_s - (verdict.window_s or 0.0)
            wait_s = 0.0 if beyond_s < 0 else max(_LOOK_AT_POSITION_S, beyond_s)  # nobody plays faster than time goes
        elif self._paced:
            wait_s, ahead_s = self._clock.wait_s(self._media_s), self._media_s - self._clock.position_s()
            if self._chunk == 1 and self._clock.started:
                wait_s = max(wait_s, ahead_s - _SECOND_AHEAD_S)
        else:
            return 0.0
        if wait_s == 0:
            self._metrics.observe("diagonal_send_window_media_seconds", max(0.0, ahead_s))
        return wait_s

    async def _fail(self, code: str, message: str) -> str:
        await self._end(Status.FAILED, code, message)
        return "failed"

    async def _end(self, status: Status, code: str, message: str) -> None:
        await call_with_retry(lambda: self._store.end(self._video.id, status, code, message))
