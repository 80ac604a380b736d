"""The stepper: which sessions' chunks are made next, and what becomes of each. One thread drives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch

from diagonal.diffusion.rollout import KeptChunk
from diagonal.engine.budget import ChunkKind, CostModel, first_stable_chunk
from diagonal.engine.chunk_maker import ChunkMaker, Emitted, SessionError
from diagonal.engine.drift import ReanchorPolicy
from diagonal.engine.pipeline import InFlightBatch, StepTimer, decode_streams
from diagonal.engine.reporting import EngineReport
from diagonal.engine.scheduler import Candidate, choose
from diagonal.engine.session import ChunkResult, Session, SessionState
from diagonal.engine.session_table import SessionTable
from diagonal.engine.specs import PromptChange, SessionSpec
from diagonal.model.compiled import load_compiled, save_compiled

FAILURES_IN_ROW = 3  # after so many failed chunks without a good one the engine no longer calls itself well
ENCODING_WAIT_S = 1.0  # an idle engine waits so long at once for a prompt to be encoded
_PROBE = SessionSpec("engine probe", "a probe", 0, None, paced=False)
Chosen = list[tuple[Session, list[PromptChange]]]


@dataclass(frozen=True)
class Health:
    """Whether chunks come out; `failures_in_row` counts those that did not since one did."""

    healthy: bool
    failures_in_row: int


class Stepper:
    """Chooses batches, launches and completes them, and measures what they cost."""

    def __init__(
        self,
        maker: ChunkMaker,
        table: SessionTable,
        cost: CostModel,
        report: EngineReport,
        clock: Callable[[], float],
        reanchor: ReanchorPolicy,
    ) -> None:
        self._maker, self._table, self._cost, self._report = maker, table, cost, report
        self._clock, self._reanchor, self._metrics = clock, reanchor, report.metrics
        self._serve, self._geometry = maker.config.serve, maker.config.geometry
        self._streams = decode_streams(maker.pool.keys.device, self._serve.overlap_decode)
        self._failures_in_row, self._encoding, self._completed_s = 0, False, -inf
        self.in_flight: list[InFlightBatch] = []

    @torch.no_grad()
    def step(self) -> list[ChunkResult]:
        """Launch a batch, and complete what is due.

        With `serve.overlap_decode` the next batch's forwards are given to the device before one is completed: it is
        decoded beside them. That batch is of others, or, where nobody else asks, of the same sessions once more. Who
        is paused or closed is so when what is in flight is out.
        """
        started_s = self._clock()
        due = self.launch()
        if due and self._serve.overlap_decode:
            self._launch(self._next_batch())
        return self.complete(due, started_s)

    @torch.no_grad()
    def launch(self) -> int:
        """Begin the chunks of the next batch, where none is in flight; how many batches are."""
        self._settle()
        if not self.in_flight:
            self._launch(self._next_batch() or self._next_batch_encoded())
        return len(self.in_flight)

    @torch.no_grad()
    def complete(self, due: int, started_s: float) -> list[ChunkResult]:
        """Bring out so many batches, oldest first, or more where those have nothing to show."""
        completed, results = 0, list[ChunkResult]()
        while self.in_flight and (completed < due or not results):
            results += self._complete(self.in_flight.pop(0))
            completed += 1
        if completed:
            self._settle()
            pixel_frames = sum(len(result.pixels) for result in results)
            self._report.step(pixel_frames, self._clock() - started_s, self._geometry.pixel_fps)
        return results

    @torch.no_grad()
    def warm_up(self) -> None:
        """Rehearse every batch size, so that admission and the scheduler know what steps cost.

        The first round of each size is not counted: it compiles kernels, captures graphs and fills allocators. Where
        there are such, every size that may come is made, or its first batch would wait for them.
        """
        serve = self._serve
        largest = min(serve.batch_sessions, serve.max_sessions)
        sizes = range(1, largest) if serve.compile else [size for size in (1, 2, 4, 8, 16, 32) if size < largest]
        kept = Path(serve.compile_cache) if serve.compile and serve.compile_cache else None
        if kept is not None:
            load_compiled(kept, self._maker.identity.config)
        for size in [*sizes, largest]:
            for counted in (False, True):
                self._rehearse(size, counted)
        if kept is not None:
            save_compiled(kept, self._maker.identity.config)

    @torch.no_grad()
    def exercise(self) -> bool:
        """Make one chunk for nobody. When sessions hold every page, their own chunks are the exercise instead."""
        if self._maker.pool.free_pages == 0:
            return self.health().healthy
        try:
            session = self._maker.new_session(_PROBE, self._maker.config.schedule)
            try:
                self._maker.prepare(session)
                self._rehearse_chunk([session])
            finally:
                session.cache.close()
        except SessionError:
            self._failures_in_row += 1
            return False
        self._failures_in_row = 0
        return True

    def health(self) -> Health:
        return Health(self._failures_in_row < FAILURES_IN_ROW, self._failures_in_row)

    def _settle(self) -> None:
        if self._table.settle(self._maker, self._clock()):
            self._report.occupancy()

    # Which chunks are next

    def _asks(self, session: Session) -> bool:
        """Whether a chunk of it may be begun: it asked for one, and has none in flight or one that it can follow."""
        if session.ended or not session.live or self._table.is_closing(session):
            return False
        return session.asks(self._geometry) and (session.progress.in_flight == 0 or self._follows(session))

    def _follows(self, session: Session) -> bool:
        """Whether it has one chunk in flight, of which nothing that is still to come decides what the next one is."""
        batches = [batch for batch in self.in_flight if any(session is other for other in batch.sessions)]
        sound = len(batches) == 1 and batches[0].sound and not (session.needs_recache or session.pausing)
        return sound and self._reanchor.decided(session.progress.making, session.rebuild.reanchored)

    def _next_batch(self) -> Chosen:
        """The sessions to make a chunk for, and the prompt changes that each takes in."""
        now_s, serve = self._clock(), self._serve
        with self._table.lock:
            asking = {name: s for name, s in self._table.sessions.items() if self._asks(s)}
            for session in asking.values():
                self._maker.request_prompts(session)
            ready = [session for session in asking.values() if not session.prompt.encoding]
            self._encoding = len(ready) < len(asking)
            waiting = [session for session in ready if not session.progress.in_flight]
            candidates = [self._candidate(session, now_s) for session in waiting or ready]
            background_s = serve.playout_lead_s / 2 if self._table.playing else inf
            names = choose(candidates, serve.batch_sessions, self._step_s, background_s)
            for progress in (asking[name].progress for name in names):
                self._metrics.observe("diagonal_session_queue_seconds", now_s - (progress.asked_s or now_s))
                progress.asked_s = now_s
            return [(asking[name], list(asking[name].prompt.pending)) for name in names]

    def _next_batch_encoded(self) -> Chosen:
        """The same, where all that ask wait for their prompts to be encoded: that of the first, or of a new request."""
        chosen: Chosen = []
        ends_s = time.monotonic() + ENCODING_WAIT_S
        while self._encoding and not chosen and (left_s := ends_s - time.monotonic()) > 0:
            self._maker.encoded.wait(left_s)
            self._maker.encoded.clear()
            self._settle()
            chosen = self._next_batch()
        return chosen

    def _candidate(self, session: Session, now_s: float) -> Candidate:
        """Its playout slack, less the re-cache that its next chunk needs first."""
        recache_s = self._cost.recache_s(len(session.latents.window)) if session.needs_recache else 0.0
        slack_s = session.slack_s(self._geometry, now_s) + session.in_flight_media_s(self._geometry) - recache_s
        return Candidate(session.spec.session_id, slack_s, _batch_key(session), session.spec.paced, recache_s)

    def _step_s(self, key: Hashable, sessions: int) -> float:
        """Predicted seconds of a step for so many sessions of that batch key."""
        assert isinstance(key, tuple)
        levels, context, context_chunks = key
        return self._cost.step_s(ChunkKind(len(levels) + (context != "reuse"), context_chunks), sessions)

    # Launch

    def _launch(self, chosen: Chosen) -> None:
        """Prepare and denoise these sessions' chunks; they are in flight then, as are those that failed."""
        if not chosen:
            return
        timer, ready = StepTimer(self._clock()), list[Session]()
        for session, changes in chosen:
            rebuilt = timer.rebuilt or bool(session.rebuild.reason)
            try:
                recached = self._prepare(session, changes)
                timer = replace(timer, recached=timer.recached + recached, rebuilt=rebuilt)
                ready.append(session)
            except SessionError as error:
                self._fly(InFlightBatch.failed(session, error, timer.started_s))
        if ready:
            self._make(ready, timer)

    def _prepare(self, session: Session, changes: Sequence[PromptChange]) -> int:
        """Bring a session to its next chunk; returns the chunks re-cached."""
        reanchored, rebuild_reason = session.rebuild.reanchored, session.rebuild.reason
        recached = self._maker.prepare(session, changes)
        if session.spec.paced:
            with self._table.lock:
                self._cost.observe_chunk(recached > 0)
        if recached:
            reason = rebuild_reason or ("reanchor" if session.rebuild.reanchored != reanchored else "prompt")
            self._metrics.inc("diagonal_recaches_total", reason=reason)
            self._metrics.inc("diagonal_model_forward_calls_total", recached)
        return recached

    def _make(self, batch: Sequence[Session], timer: StepTimer | None) -> None:
        """Send off a chunk for each; when the shared forward fails, one by one, so that only the culprit ends."""
        started_s, kind = self._clock(), batch[0].chunk_kind
        begun_s = timer.started_s if timer else started_s
        try:
            denoised = self._maker.denoise(batch)
        except SessionError as error:
            if len(batch) == 1:
                return self._fly(InFlightBatch.failed(batch[0], error, begun_s))
            for session in batch:
                self._make([session], None)
            return
        self._metrics.inc("diagonal_model_forward_calls_total", denoised.forwards)
        numbers, stream = self._open_numbers(batch), next(self._streams)
        decoding = InFlightBatch.decoding(self._maker, batch, numbers, denoised, stream, begun_s, kind, timer)
        if self._maker.pool.keys.is_cuda:
            self._maker.draw_ahead(batch)
        self._fly(decoding)

    def _fly(self, batch: InFlightBatch) -> None:
        with self._table.lock:
            for session in batch.sessions:
                session.progress.in_flight += 1
        self.in_flight.append(batch)

    def _open_numbers(self, sessions: Sequence[Session]) -> list[int]:
        """Numbers of those sessions that were not closed meanwhile."""
        with self._table.lock:
            return [number for number, session in enumerate(sessions) if not self._table.is_closing(session)]

    # Completion

    def _complete(self, batch: InFlightBatch) -> list[ChunkResult]:
        """Bring a batch's chunks to the host and note them; those of sessions closed meanwhile are dropped."""
        with self._table.lock:
            for session in batch.sessions:
                session.progress.in_flight -= 1
        results: list[ChunkResult] = []
        for number, shown in batch.to_host(self._open_numbers(batch.sessions), self._maker).items():
            session = batch.sessions[number]
            if isinstance(shown, SessionError):
                results.append(self._fail(session, shown))
            else:
                results.append(self._finish(session, batch, shown))
        if batch.timer is not None and batch.kind is not None:
            self._measure(batch.timer, batch.kind, len(batch.sessions))
        return results

    def _finish(self, session: Session, batch: InFlightBatch, shown: Emitted) -> ChunkResult:
        """Move a session on by its chunk."""
        denoised, chunk, geometry = batch.denoised, session.progress.next_chunk, self._geometry
        assert denoised is not None
        kept = KeptChunk(chunk, shown.written, denoised.written_level, denoised.refreshed)
        session.latents.add(kept, shown.clean, session.cache, session.history_frames)
        for name, ratio in session.drift.observe(shown.pixels.numpy()).items():
            self._metrics.observe("diagonal_stream_drift_ratio", ratio, measure=name)
        self._failures_in_row = 0
        now_s = self._clock()
        self._report.slack(session, geometry, now_s)
        late = session.slack_s(geometry, now_s) < 0  # its viewer waits, for the first chunk or in a stall
        with self._table.lock:
            applied = session.prompt.take_applied()
            session.progress.next_chunk = next_chunk = chunk + 1
            if late:
                session.playback.arrived(now_s, geometry.pixel_start(chunk) / geometry.pixel_fps)
            rebuild = session.rebuild
            cause = self._reanchor.cause(session.drift, next_chunk, rebuild.reanchored)
            rebuild.reanchor_reason = rebuild.reanchor_reason or cause or ""
            saved = session.save(geometry, session.slack_s(geometry, now_s))
            saved = replace(saved, pending=tuple(session.prompt.pending))
            last = next_chunk == session.total_chunks(geometry)
            if last:
                session.move(SessionState.DONE)
        frames = session.shown_pixel_frames(geometry, chunk)
        took_s = now_s - batch.started_s
        self._metrics.inc("diagonal_frames_generated_total", frames)
        self._metrics.observe("diagonal_chunk_generation_seconds", took_s)
        return ChunkResult(
            session.spec.session_id,
            chunk,
            shown.pixels[:frames],
            geometry.pixel_start(chunk),
            took_s,
            denoised.forwards,
            applied,
            last,
            snapshot=None if last else saved,
        )

    def _fail(self, session: Session, error: SessionError) -> ChunkResult:
        """End one session with its reason; the others continue."""
        self._failures_in_row += 1
        self._metrics.inc("diagonal_session_failures_total", code=error.code)
        with self._table.lock:
            session.move(SessionState.FAILED)
        self._table.close(session.spec.session_id)
        geometry, chunk = self._geometry, session.progress.next_chunk
        empty = torch.empty((0, geometry.pixel_height, geometry.pixel_width, 3), dtype=torch.uint8)
        first = geometry.pixel_start(chunk)
        return ChunkResult(session.spec.session_id, chunk, empty, first, 0.0, 0, (), True, str(error), error.code)

    def _measure(self, timer: StepTimer, kind: ChunkKind, sessions: int) -> None:
        """Feed the cost model: a step without re-caches is a chunk's cost, the surplus of one with them is theirs.

        One that also rebuilt a decoder's state, after a pause or a move, says nothing of either.
        """
        now_s = self._clock()
        elapsed_s, self._completed_s = now_s - max(timer.started_s, self._completed_s), now_s  # overlap counts once
        with self._table.lock:
            if timer.recached == 0:
                self._cost.observe(kind, sessions, elapsed_s)
            elif not timer.rebuilt and (surplus_s := elapsed_s - self._cost.step_s(kind, sessions)) > 0:
                self._cost.observe_recache(timer.recached, surplus_s)
        self._report.chunk_time(elapsed_s / sessions)

    # Rehearsal

    def _rehearse(self, size: int, counted: bool) -> None:
        """The first chunks of `size` streams up to a full window, and a re-cache, for nobody."""
        maker = self._maker
        schedule = maker.config.schedule
        sessions = [maker.new_session(_PROBE, schedule) for _ in range(size)]
        try:
            for _ in range(first_stable_chunk(schedule, maker.window_chunks) + 1):
                started_s, kind = self._clock(), sessions[0].chunk_kind
                for session in sessions:
                    maker.prepare(session)
                self._rehearse_chunk(sessions)
                if counted:
                    self._cost.observe(kind, size, self._clock() - started_s)
            started_s = self._clock()
            recached = maker.prepare(sessions[0], [PromptChange("probe", "another probe")])
            maker.synchronize()
            if counted:
                self._cost.observe_recache(recached, self._clock() - started_s)
        finally:
            for session in sessions:
                session.cache.close()

    def _rehearse_chunk(self, sessions: Sequence[Session]) -> None:
        """One chunk of sessions that nobody opened; `SessionError` when it fails."""
        denoised, numbers = self._maker.denoise(sessions), range(len(sessions))
        batch = InFlightBatch.decoding(self._maker, sessions, numbers, denoised, next(self._streams))
        for number, shown in batch.to_host(numbers, self._maker).items():
            if isinstance(shown, SessionError):
                raise shown
            session = sessions[number]
            chunk = session.progress.next_chunk
            kept = KeptChunk(chunk, shown.written, denoised.written_level, denoised.refreshed)
            session.latents.add(kept, shown.clean, session.cache, session.history_frames)
            session.progress.next_chunk += 1


def _batch_key(session: Session) -> Hashable:
    context = session.context_chunks
    if session.rebuild.reanchor_reason:
        context = min(context, session.cache.sink_chunks + 1)
    chunk = session.progress.making
    return session.schedule.levels(chunk), session.schedule.context_of(chunk), context
