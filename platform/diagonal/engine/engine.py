"""The engine: sessions on one device, one chunk a step, batched where they can share a forward. No Ray inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from diagonal.diffusion.rollout import KeptChunk, latents_dtype
from diagonal.engine.admission import BudgetError, CapacityError, ChunkKind, settled_chunk
from diagonal.engine.chunk_maker import ChunkMaker, Emitted, Servable, SessionError
from diagonal.engine.drift import ReanchorPolicy
from diagonal.engine.in_flight import Flight, Stopwatch, decoded_aside
from diagonal.engine.lanes import lanes
from diagonal.engine.scheduler import Candidate, choose
from diagonal.engine.session import ChunkResult, Session, SessionState
from diagonal.engine.sessions import EngineStats, Sessions
from diagonal.engine.specs import PromptChange, SessionSpec
from diagonal.metrics import MetricsBackend, NullBackend
from diagonal.model.compiled import load_compiled, save_compiled

__all__ = ["BudgetError", "CapacityError", "Engine", "EngineStats", "Health"]

FAILURES_IN_ROW = 3  # after so many failed chunks without a good one the engine no longer calls itself well
READING_S = 1.0  # an idle engine waits so long at once for a prompt to be encoded
_PROBE = SessionSpec("engine probe", "a probe", 0, None, paced=False)


@dataclass(frozen=True)
class Health:
    """Whether chunks come out; `failures_in_row` counts those that did not since one did."""

    healthy: bool
    failures_in_row: int


class Engine(Sessions):
    """Owns the pool and the sessions of one device.

    `step`, `warm_up` and `exercise` belong to the one thread that drives the engine; all else (`Sessions`) may be
    called from any thread. With `read_aside`, `open`, `restore`, `interact` and `resume` return before new prompts are
    encoded, and their sessions' chunks wait for that, nobody else's.
    """

    def __init__(
        self,
        release: Servable,
        *,
        device: torch.device | str = "cpu",
        metrics: MetricsBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
        reanchor: ReanchorPolicy | None = None,
        read_aside: bool = False,
    ) -> None:
        maker = ChunkMaker(release, device, release.config.serve.max_sessions)
        super().__init__(maker, metrics or NullBackend(), clock, read_aside)
        self._pool = maker.pool
        self._reanchor = reanchor or ReanchorPolicy.of(self.config.serve, maker.window_chunks)
        self._failures_in_row = 0
        self._reading = False
        self._overlaps = self.config.serve.overlap_decode
        self._lanes = lanes(self._pool.keys.device, self._overlaps)
        self._flights: list[Flight] = []
        self._landed_s = -inf

    @torch.no_grad()
    def step(self) -> list[ChunkResult]:
        """Generate the next chunk of the sessions with least slack among those that asked; [] when none did.

        With `serve.overlap_decode` the next batch's forwards are given to the device before one is brought over: it is
        decoded beside them. That batch is of others, or, where nobody else asks, of the same sessions once more. Who is
        paused or closed is so when what is under way is out.
        """
        started_s = self._clock()
        self._settle()
        if not self._flights:
            self._launch(self._next_batch() or self._after_reading())
        under_way = len(self._flights)
        if self._overlaps and under_way:
            self._launch(self._next_batch())
        flown, results = 0, list[ChunkResult]()
        while self._flights and (flown < under_way or not results):
            results += self._land(self._flights.pop(0))
            flown += 1
        if flown:
            self._settle()
            self._report_step(sum(len(result.pixels) for result in results), self._clock() - started_s)
        return results

    def _asks(self, session: Session) -> bool:
        """Whether a chunk of it may be begun: it asked for one, and has none under way or one that it can follow."""
        if session.ended or not session.live or session.spec.session_id in self._closing:
            return False
        return session.asks(self.geometry) and (session.under_way == 0 or self._follows(session))

    def _follows(self, session: Session) -> bool:
        """Whether it has one chunk under way, of which nothing that is still to come decides what the next one is."""
        flights = [flight for flight in self._flights if any(session is other for other in flight.batch)]
        sound = len(flights) == 1 and flights[0].whole and session.settled
        return sound and self._reanchor.settled(session.making, session.reanchored)

    def _launch(self, chosen: Sequence[tuple[Session, list[PromptChange]]]) -> None:
        """Prepare and denoise these sessions' chunks; they are under way then, as are those that failed."""
        if not chosen:
            return
        watch, ready = Stopwatch(self._clock()), list[Session]()
        for session, changes in chosen:
            rebuilt = watch.rebuilt or bool(session.stale)
            try:
                recached = self._prepare(session, changes)
                watch = replace(watch, recached=watch.recached + recached, rebuilt=rebuilt)
                ready.append(session)
            except SessionError as error:
                self._fly(Flight.failed(session, error, watch.started_s))
        if ready:
            self._make(ready, watch)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Measure what chunks and re-caches cost, by kind and batch size, before the first session comes.

        The first round of each size is not counted: it compiles kernels, captures graphs and fills allocators. Where
        there are such, every size that may come is made, or its first batch would wait for them.
        """
        serve = self.config.serve
        largest = min(serve.batch_sessions, self._slots)
        sizes = range(1, largest) if serve.compile else [size for size in (1, 2, 4, 8, 16, 32) if size < largest]
        kept = Path(serve.compile_cache) if serve.compile and serve.compile_cache else None
        if kept is not None:
            load_compiled(kept, self.identity.config)
        for size in [*sizes, largest]:
            for counted in (False, True):
                self._rehearse(size, counted)
        if kept is not None:
            save_compiled(kept, self.identity.config)

    @torch.no_grad()
    def exercise(self) -> bool:
        """Make one chunk for nobody; whether that went well, which also is what `health` then says.

        When sessions hold every page, their own chunks are the exercise, and nothing is made.
        """
        if self._pool.free_pages == 0:
            return self.health().healthy
        try:
            session = self._maker.new_session(_PROBE, self.config.schedule)
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
        """Unhealthy after three failed chunks in a row, until one or `exercise` succeeds."""
        return Health(self._failures_in_row < FAILURES_IN_ROW, self._failures_in_row)

    def _settle(self) -> None:
        """At a chunk boundary: free what was closed, and leave of paused sessions their snapshots."""
        now_s = self._clock()
        with self._lock:
            flying = {session_id for session_id, session in self._sessions.items() if session.under_way}
            closing, self._closing = self._closing - flying, self._closing & flying
            gone = [self._sessions.pop(session_id) for session_id in closing if session_id in self._sessions]
            pausing = [
                session
                for session_id, session in self._sessions.items()
                if session.pausing and not session.ended and session_id not in flying
            ]
            for session in pausing:
                session.pausing = False
                session.ahead_s = None if session.started_s is None else session.slack_s(self.geometry, now_s)
                session.move(SessionState.PAUSED)
                session.log("pause")
        for session in gone:
            session.cache.close()
            if not session.ended:
                session.move(SessionState.CANCELLED)
        for session in pausing:
            self._maker.evict(session)
            assert session.saved is not None
            session.saved = replace(session.saved, ahead_s=session.ahead_s)
        if gone or pausing:
            self._report_occupancy()

    def _next_batch(self) -> list[tuple[Session, list[PromptChange]]]:
        """The sessions to make a chunk for, and the prompt changes that each takes in."""
        now_s = self._clock()
        with self._lock:
            self._reading = False
            asking = {i: s for i, s in self._sessions.items() if self._asks(s)}
            for session in asking.values():
                self._maker.ask_texts(session)
                self._reading = self._reading or session.reading
            ready = [session for session in asking.values() if not session.reading]
            waiting = [session for session in ready if not session.under_way]
            candidates = [self._candidate(session, now_s) for session in waiting or ready]
            playing = any(session.playing for session in self._sessions.values())
            serve = self.config.serve
            background_s = serve.lead_s / 2 if playing else inf
            chosen = [asking[i] for i in choose(candidates, serve.batch_sessions, self._step_s, background_s)]
            for session in chosen:
                self._metrics.observe("diagonal_session_queue_seconds", now_s - (session.asked_s or now_s))
                session.asked_s = now_s
            return [(session, list(session.pending)) for session in chosen]

    def _after_reading(self) -> list[tuple[Session, list[PromptChange]]]:
        """The same, where all that ask wait for their prompts to be encoded: that of the first, or of a new request."""
        chosen: list[tuple[Session, list[PromptChange]]] = []
        ends_s = time.monotonic() + READING_S
        while self._reading and not chosen and (left_s := ends_s - time.monotonic()) > 0:
            self._maker.prompts.news.wait(left_s)
            self._maker.prompts.news.clear()
            self._settle()
            chosen = self._next_batch()
        return chosen

    def _candidate(self, session: Session, now_s: float) -> Candidate:
        """Its playout slack, less the re-cache that its next chunk needs first."""
        due = session.pending or session.timeline.moving or session.stale or session.reanchor
        recache_s = self._cost.recache_s(len(session.kept)) if due else 0.0
        under_way_s = session.ahead_media_s(self.geometry)
        slack_s = session.slack_s(self.geometry, now_s) + under_way_s - recache_s
        return Candidate(session.spec.session_id, slack_s, _batch_key(session), session.spec.paced, recache_s)

    def _step_s(self, key: Hashable, sessions: int) -> float:
        """Predicted seconds of a step for so many sessions of that batch key."""
        assert isinstance(key, tuple)
        levels, context, context_chunks = key
        return self._cost.step_s(ChunkKind(len(levels) + (context != "reuse"), context_chunks), sessions)

    def _prepare(self, session: Session, changes: Sequence[PromptChange]) -> int:
        """Bring a session to its next chunk; returns the chunks re-cached."""
        reanchored, stale = session.reanchored, session.stale
        recached = self._maker.prepare(session, changes)
        if session.spec.paced:
            with self._lock:
                self._cost.observe_chunk(recached > 0)
        if recached:
            reason = stale or ("reanchor" if session.reanchored != reanchored else "prompt")
            self._metrics.inc("diagonal_recaches_total", reason=reason)
            self._metrics.inc("diagonal_model_forward_calls_total", recached)
        return recached

    def _make(self, batch: Sequence[Session], watch: Stopwatch | None) -> None:
        """Send off a chunk for each; when the shared forward fails, one by one, so that only the culprit ends."""
        started_s, kind = self._clock(), _kind(batch[0])
        begun_s = watch.started_s if watch else started_s
        try:
            done = self._maker.denoise(batch)
        except SessionError as error:
            if len(batch) == 1:
                return self._fly(Flight.failed(batch[0], error, begun_s))
            for session in batch:
                self._make([session], None)
            return
        self._metrics.inc("diagonal_model_forward_calls_total", done.forwards)
        lane = next(self._lanes)
        pixels, finite = decoded_aside(self._maker, batch, self._wanted(batch), done, lane)
        if self._pool.keys.is_cuda:
            self._maker.draw_ahead(batch)
        self._fly(Flight(batch, pixels, lane, begun_s, done, finite, kind, watch))

    def _fly(self, flight: Flight) -> None:
        with self._lock:
            for session in flight.batch:
                session.under_way += 1
        self._flights.append(flight)

    def _wanted(self, batch: Sequence[Session]) -> list[int]:
        """Numbers of the batch's sessions that were not closed meanwhile."""
        with self._lock:
            return [number for number, session in enumerate(batch) if session.spec.session_id not in self._closing]

    def _land(self, flight: Flight) -> list[ChunkResult]:
        """Bring over and note a batch's chunks; those of sessions closed meanwhile are dropped."""
        with self._lock:
            for session in flight.batch:
                session.under_way -= 1
        results: list[ChunkResult] = []
        for number, found in flight.bring(self._wanted(flight.batch), latents_dtype(self.config)).items():
            session = flight.batch[number]
            if isinstance(found, SessionError):
                results.append(self._fail(session, found))
            else:
                results.append(self._finish(session, flight, found))
        if flight.watch is not None and flight.kind is not None:
            self._measure(flight.watch, flight.kind, len(flight.batch))
        return results

    def _finish(self, session: Session, flight: Flight, shown: Emitted) -> ChunkResult:
        """Move a session on by its chunk."""
        done, started_s, chunk = flight.done, flight.started_s, session.next_chunk
        assert done is not None
        session.remember(KeptChunk(chunk, shown.written, done.written_level), shown.clean)
        self._note_drift(session, shown.pixels)
        self._failures_in_row = 0
        now_s = self._clock()
        self._report_slack(session, now_s)
        waits = session.slack_s(self.geometry, now_s) < 0  # its viewer, for the first chunk or in a stall
        with self._lock:
            for _ in session.applying:
                session.pending.popleft()
            applied, session.applying = tuple(change.event_id for change in session.applying), ()
            session.next_chunk += 1
            if waits:
                session.started_s = now_s - self.geometry.pixel_start(chunk) / self.geometry.pixel_fps
            session.reanchor = session.reanchor or self._reanchor_cause(session)
            saved = session.save(self.geometry, session.slack_s(self.geometry, now_s))
            saved = replace(saved, pending=tuple(session.pending))
            last = session.next_chunk == session.total_chunks(self.geometry)
            if last:
                session.move(SessionState.DONE)
        frames = session.shown_pixel_frames(self.geometry, chunk)
        self._metrics.inc("diagonal_frames_generated_total", frames)
        self._metrics.observe("diagonal_chunk_generation_seconds", now_s - started_s)
        return ChunkResult(
            session.spec.session_id,
            chunk,
            shown.pixels[:frames],
            self.geometry.pixel_start(chunk),
            now_s - started_s,
            done.forwards,
            applied,
            last,
            snapshot=None if last else saved,
        )

    def _note_drift(self, session: Session, pixels: Tensor) -> None:
        for name, ratio in session.drift.observe(pixels.numpy()).items():
            self._metrics.observe("diagonal_stream_drift_ratio", ratio, measure=name)

    def _reanchor_cause(self, session: Session) -> str:
        return self._reanchor.cause(session.drift, session.next_chunk, session.reanchored) or ""

    def _measure(self, watch: Stopwatch, kind: ChunkKind, sessions: int) -> None:
        """Feed the cost model: a step without re-caches is a chunk's cost, the surplus of one with them is theirs.

        One that also built a decoder's state, after a pause or a move, tells of neither.
        """
        now_s = self._clock()
        elapsed_s, self._landed_s = now_s - max(watch.started_s, self._landed_s), now_s  # what ran beside counts once
        with self._lock:
            if watch.recached == 0:
                self._cost.observe(kind, sessions, elapsed_s)
            elif not watch.rebuilt and (surplus_s := elapsed_s - self._cost.step_s(kind, sessions)) > 0:
                self._cost.observe_recache(watch.recached, surplus_s)
        each_s = elapsed_s / sessions
        self._chunk_s = each_s if self._chunk_s == 0.0 else 0.9 * self._chunk_s + 0.1 * each_s

    def _fail(self, session: Session, error: SessionError) -> ChunkResult:
        """End one session with its reason; the others go on."""
        self._failures_in_row += 1
        self._metrics.inc("diagonal_session_failures_total", code=error.code)
        with self._lock:
            session.move(SessionState.FAILED)
        self.close(session.spec.session_id)
        empty = torch.empty((0, self.geometry.pixel_height, self.geometry.pixel_width, 3), dtype=torch.uint8)
        first = self.geometry.pixel_start(session.next_chunk)
        return ChunkResult(
            session.spec.session_id, session.next_chunk, empty, first, 0.0, 0, (), True, str(error), error.code
        )

    def _rehearse(self, size: int, counted: bool) -> None:
        """The first chunks of `size` streams up to a full window, and a re-cache, for nobody."""
        chunks = settled_chunk(self.config.schedule, self._maker.window_chunks) + 1
        sessions = [self._maker.new_session(_PROBE, self.config.schedule) for _ in range(size)]
        try:
            for _ in range(chunks):
                started_s, kind = self._clock(), _kind(sessions[0])
                for session in sessions:
                    self._maker.prepare(session)
                self._rehearse_chunk(sessions)
                if counted:
                    self._cost.observe(kind, size, self._clock() - started_s)
            started_s = self._clock()
            recached = self._maker.prepare(sessions[0], [PromptChange("probe", "another probe")])
            self._maker.settle()
            if counted:
                self._cost.observe_recache(recached, self._clock() - started_s)
        finally:
            for session in sessions:
                session.cache.close()

    def _rehearse_chunk(self, sessions: Sequence[Session]) -> None:
        """One chunk of sessions that nobody opened; `SessionError` when it fails."""
        done, lane, everybody = self._maker.denoise(sessions), next(self._lanes), range(len(sessions))
        pixels, finite = decoded_aside(self._maker, sessions, everybody, done, lane)
        flight = Flight(sessions, pixels, lane, 0.0, done, finite)
        for number, made in flight.bring(everybody, latents_dtype(self.config)).items():
            if isinstance(made, SessionError):
                raise made
            session = sessions[number]
            session.remember(KeptChunk(session.next_chunk, made.written, done.written_level), made.clean)
            session.next_chunk += 1


def _kind(session: Session) -> ChunkKind:
    """What the session's next chunk costs depends on this, and on the size of its batch."""
    return ChunkKind(session.schedule.forwards(session.making), session.context_chunks)


def _batch_key(session: Session) -> Hashable:
    context = session.context_chunks
    if session.reanchor:
        context = min(context, session.cache.sink_chunks + 1)
    return session.schedule.levels(session.making), session.schedule.resolved_context, context
