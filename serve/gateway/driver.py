"""Brings one video from its replica to the store: one unary pull a chunk, paced by who watches.

What it does next is decided by `serve.policies.driving`. Where nobody paces a video a pull brings every chunk that is
there: when the others are slower than the engine, that is several, and what a call costs is shared among them.
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
from serve.policies.driving import (
    LATE,
    LOOK_AT_REPLICA_S,
    LOOK_EVERY_S,
    SLOW_MOVE_EVERY_S,
    DriveState,
    End,
    Move,
    Pause,
    Pull,
    Wait,
    media_ahead_s,
    next_action,
)
from serve.policies.pacing import PlaybackClock
from serve.records import DriveDecision, EncodedChunk, Pacing, PutChunks, Refused, Status, VideoRecord
from serve.rpc import UNAVAILABLE, call, call_with_retry

_LOG = logging.getLogger("ray.serve")
_BEAT_S = 0.8  # how often the store hears of a driver at least, whatever it waits for
_WHOLE_SNAPSHOT_EVERY = 8  # between them only what a chunk adds is kept
_AWAY_S = 0.5  # a store that needs longer for an answer was away
_RELEASE_S = 2.0


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
        self._checked_s = time.monotonic()
        self._decision: DriveDecision | None = None  # of the store, when it took the newest chunk
        self._state = DriveState(
            PlaybackClock(lead_s, time.monotonic),
            video.live,
            video.pacing is Pacing.REALTIME,
            start_timeout_s,
            unwatched_since_s=self._checked_s,
            chunk=video.chunks_done,
            media_s=video.frames_done / video.fps,
            whole=video.whole,
            paused=video.epoch > 0,  # the replica was told to pause, or another driver may have done so
        )
        self._from_s = self._state.media_s  # who watched before another gateway went has nothing left to play
        self._take(video)

    def _take(self, video: VideoRecord) -> None:
        """The session is at the video's replica now."""
        self._video, self._session = video, ReplicaSession(self._replicas, video)
        self._saved_chunk = self._whole_chunk = -1  # the newest ones with a (whole) snapshot in the store, from here
        self._state.note_trouble(None, time.monotonic())
        self._looked_s = time.monotonic()

    async def run(self) -> None:
        """Until the end. When this task is cancelled the video is left for another driver, which may come at once."""
        beat = asyncio.ensure_future(self._beat())
        try:
            outcome = await self._drive()
        except UNAVAILABLE as error:
            _LOG.warning("video %s: %s", self._video.id, type(error).__name__)
            outcome = "failed"
            with contextlib.suppress(*UNAVAILABLE):
                await self._end(End(outcome, GONE.code, GONE.message))
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

    async def _drive(self) -> str | None:
        """Carry out one action after the other; how the session ended, None when another driver has it."""
        state = self._state
        if state.whole:
            await call_with_retry(lambda: self._store.complete(self._video.id))
            return "completed"
        while True:
            await self._ask_store()
            match next_action(state, time.monotonic()):
                case End() as end:
                    return await self._end(end)
                case Move(cause, once):
                    if not await self._move(cause, once):
                        return None
                case Pause(paused):
                    await self._pause(paused)
                case Wait(seconds):
                    if not await self._look_at_replica():
                        await asyncio.sleep(seconds)
                case Pull(ahead):
                    await self._pull(ahead)

    async def _ask_store(self) -> None:
        """Have the store's newest decision: that of the chunk that it just took, or another."""
        state = self._state
        state.decision, self._decision = self._decision or await self._check(), None
        if state.decision.readers:
            state.clock.start(self._from_s)

    async def _end(self, end: End) -> str | None:
        if end.code:
            status = Status.FAILED if end.outcome == "failed" else Status.CANCELLED
            await call_with_retry(lambda: self._store.end(self._video.id, status, end.code, end.message))
        return end.outcome

    async def _pull(self, ahead: int) -> None:
        """Take the next chunks, with what another replica needs to continue after them.

        The first one comes alone and without: somebody waits for it, and a session that is lost before its second chunk
        begins again from its seed.
        """
        state = self._state
        if state.paced or state.decision.position_s is not None:
            self._metrics.observe("diagonal_send_window_media_seconds", max(0.0, media_ahead_s(state)))
        since_chunk = None if state.chunk == 0 else -1 if self._wants_whole() else self._saved_chunk
        made = await self._session.pull(state.chunk, ahead, since_chunk)
        if isinstance(made, Refused):
            state.note_trouble(made, time.monotonic(), lost=made is GONE or made.code == "replica_unwell")
            return
        state.note_trouble(None, time.monotonic())
        if made is not None:
            await self._keep(made[:1] if state.chunk == 0 else made)

    def _wants_whole(self) -> bool:
        """Whether the next snapshot is to be a whole one."""
        return self._saved_chunk < 0 or self._state.chunk - self._whole_chunk >= _WHOLE_SNAPSHOT_EVERY

    async def _keep(self, made: tuple[EncodedChunk, ...]) -> None:
        """Give the store the chunks, and with them what another replica needs to continue after the newest."""
        state = self._state
        stalled_s = state.clock.arrived(state.media_s)
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
        self._decision = await call_with_retry(lambda: self._store.put_chunks(request))
        self._metrics.observe("diagonal_store_write_seconds", time.monotonic() - began_s)
        if self._decision is None:  # not wanted: the store says why
            self._decision = replace(await self._check(), go=False)
            return
        self._note_watched(self._decision, began_s)
        self._checked_s = self._looked_s = time.monotonic()  # store and replica both answered
        self._saved_chunk = newest.chunk if snapshot else -1
        self._whole_chunk = newest.chunk if whole else self._whole_chunk
        state.chunk, state.whole = newest.chunk + 1, newest.last
        state.media_s += sum(chunk.frames for chunk in made) / self._video.fps

    async def _save_recording(self) -> None:
        """Keep the log of a session that is recorded, as far as it went, before its replica forgets it."""
        if self._video.record and (text := await self._session.recording()):
            with contextlib.suppress(*UNAVAILABLE):
                await call(self._store.put_recording(self._video.id, text))

    async def _move(self, cause: Refused, once: bool) -> bool:
        """Continue the session on another replica; False when it is lost, or somebody else's.

        One that is only slow stays where it is unless another replica takes it at once.
        """
        state, old = self._state, self._session
        if cause.code == "chunk_gone":
            await old.close("moved")
        watched = self._video.live or state.decision.readers
        ahead_s = state.media_s - state.clock.position_s()
        patience_s = PATIENCE_S if watched else UNWATCHED_PATIENCE_S
        video = replace(self._video, chunks_done=state.chunk)
        moved = await rehome(video, self._store, self._replicas, ahead_s, patience_s, once=once)
        if once:
            state.next_slow_move_s = time.monotonic() + SLOW_MOVE_EVERY_S
            stays = "moved" if isinstance(moved, VideoRecord) else "stays there"
            _LOG.warning("video %s: %s at %s: the session %s", video.id, cause.message, video.replica, stays)
        self._count_move(cause, moved, once)
        if isinstance(moved, VideoRecord):
            if cause.code == LATE:
                await old.close("moved")
            self._take(moved)
            state.paused = False
            return True
        if moved is None:
            return False
        if once:
            return True
        _LOG.error("video %s finds no other replica: %s", self._video.id, moved.code)
        await self._end(End("failed", GONE.code, GONE.message))
        return False

    def _count_move(self, cause: Refused, moved: VideoRecord | Refused | None, once: bool) -> None:
        outcome = "superseded" if moved is None else "stayed" if once else "failed"
        if isinstance(moved, VideoRecord):
            outcome = "moved"
        why = "replica_gone" if cause is GONE else cause.code
        self._metrics.inc("diagonal_session_migrations_total", cause=why, outcome=outcome)

    async def _look_at_replica(self) -> bool:
        """Whether the session is in trouble; asked now and then. That of one that is paused can wait, too."""
        state, now_s = self._state, time.monotonic()
        if state.paused or now_s - self._looked_s < LOOK_AT_REPLICA_S:
            return False
        self._looked_s = now_s
        state.note_trouble(await self._session.trouble(), time.monotonic())
        return state.trouble is not None

    async def _pause(self, paused: bool) -> None:
        """Free the session's cache while its viewer wants no chunks, and take it again when he does and there is room.

        A replica is told again what a gateway or another driver told it before; it then has nothing to do.
        """
        state = self._state
        if paused:
            state.clock.pause()
            state.paused = True
            await self._session.pause()
            return
        refused = await self._session.resume()
        if refused is None or refused.retry_after_s is None:  # a replica that lost it says so at the next pull
            state.clock.resume()
            state.paused = False
        else:
            await asyncio.sleep(LOOK_EVERY_S)

    async def _beat(self) -> None:
        """Let the store hear of this driver while a call takes long."""
        while True:
            await asyncio.sleep(max(0.0, self._checked_s + _BEAT_S - time.monotonic()))
            self._checked_s = time.monotonic()
            with contextlib.suppress(*UNAVAILABLE):
                await call(self._store.check(self._video.id, self._video.epoch))

    async def _check(self) -> DriveDecision:
        self._checked_s = asked_s = time.monotonic()
        decision = await call_with_retry(lambda: self._store.check(self._video.id, self._video.epoch))
        self._note_watched(decision, asked_s)
        return decision

    def _note_watched(self, decision: DriveDecision, asked_s: float) -> None:
        """Since when nobody watches, as far as one can know: a store that was away may have forgotten readers."""
        now_s = time.monotonic()
        if decision.readers or now_s - asked_s > _AWAY_S:
            self._state.unwatched_since_s = now_s
