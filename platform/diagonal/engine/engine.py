"""The engine: sessions on one device, one chunk a step, batched where they can share a forward. No Ray inside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagonal.diffusion.rollout import (
    DenoisedChunk,
    KeptChunk,
    chunk_noise_of,
    denoise_chunk,
    new_cache,
    new_pool,
    recache,
)
from diagonal.engine.scheduler import Candidate, choose
from diagonal.engine.session import (
    ChunkResult,
    Event,
    PromptChange,
    Session,
    SessionSpec,
    SessionState,
    Snapshot,
    Transition,
)
from diagonal.errors import require
from diagonal.metrics import MetricSink, NullSink
from diagonal.model.cache import CacheBatch
from diagonal.model.weights import Release
from diagonal.schedule import StepSchedule


class CapacityError(RuntimeError):
    """No slot is free; `retry_after_s` is when to ask again."""

    def __init__(self, sessions: int, retry_after_s: float) -> None:
        super().__init__(f"all {sessions} session slots are in use; retry after {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class EngineStats:
    """A reading of the engine; `chunk_s` is the moving mean of a chunk's generation time, 0 before the first."""

    active_sessions: int
    free_slots: int
    cache_bytes: int
    cache_capacity_bytes: int
    chunk_s: float


class Engine:
    """Owns the pool and the sessions of one device.

    `open`, `interact`, `request`, `close` and `stats` may be called from any thread; `step`, `snapshot` and `restore`
    belong to the one thread that drives the engine.
    """

    def __init__(
        self,
        release: Release,
        *,
        device: torch.device | str = "cpu",
        metrics: MetricSink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = release.config
        self.geometry = release.config.geometry
        self._network = release.generator(device)
        self._text = release.text(device)
        self._decoder = release.decoder(device)
        self._slots = self.config.serve.max_sessions
        window = self.config.cache.window_frames // self.geometry.chunk_frames
        self._pool = new_pool(self.config, self._network, self._slots * window)
        self._metrics = metrics or NullSink()
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._closing: set[str] = set()
        self._lock = threading.Lock()
        self._chunk_s = 0.0

    def open(self, spec: SessionSpec) -> None:
        """Accept a session. `FieldError` on a wrong field or an id in use, `CapacityError` when all slots are taken."""
        schedule = self._schedule(spec)
        with self._lock:
            require(spec.session_id not in self._sessions, "session_id", spec.session_id, "an id that is not in use")
            if len(self._sessions) >= self._slots:
                raise CapacityError(self._slots, max(1.0, self._chunk_s))
            self._sessions[spec.session_id] = self._new_session(spec, schedule)
        self._report_occupancy()

    def interact(self, session_id: str, change: PromptChange) -> None:
        """Queue a prompt change for the next chunk; `KeyError` for an unknown session."""
        with self._lock:
            self._sessions[session_id].pending.append(change)

    def request(self, session_id: str) -> None:
        """Ask for the session's next chunk; `KeyError` for an unknown session."""
        with self._lock:
            self._sessions[session_id].asked = True

    def close(self, session_id: str) -> None:
        """End a session; its cache is free at the next step at the latest. Unknown ids are ignored."""
        with self._lock:
            if session_id in self._sessions:
                self._closing.add(session_id)

    def stats(self) -> EngineStats:
        """Sessions, slots, cache bytes and chunk time now."""
        with self._lock:
            active = len(self._sessions)
        return EngineStats(
            active, self._slots - active, self._pool.bytes_in_use, self._pool.capacity_bytes, self._chunk_s
        )

    @torch.no_grad()
    def step(self) -> list[ChunkResult]:
        """Generate the next chunk of the sessions with least slack among those that asked; [] when none did."""
        self._free_closed()
        ready, results = [], []
        for session in self._next_batch():
            try:
                self._prepare(session)
                ready.append(session)
            except (RuntimeError, ValueError) as error:
                results.append(self._fail(session, error))
        return results + self._generate_isolated(ready)

    def snapshot(self, session_id: str) -> Snapshot:
        """What is needed to go on elsewhere.

        `KeyError` for an unknown session, `FieldError` before its first chunk and after its end.
        """
        session = self._sessions[session_id]
        under_way = session.history is not None and not session.ended
        require(under_way, "session", session_id, "a session that has finished a chunk and has not ended")
        assert session.history is not None and session.text is not None
        with self._lock:
            pending = tuple(session.pending)
        return Snapshot(
            session.spec, session.next_chunk, tuple(session.kept), session.history, session.text,
            session.transition, pending, tuple(session.events),
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go on with a session of another engine: re-cache its window, rebuild its decoder.

        Errors as `open`; one that comes later closes the session again.
        """
        self.open(snapshot.spec)
        session = self._sessions[snapshot.spec.session_id]
        try:
            self._take_over(session, snapshot)
        except (RuntimeError, ValueError):
            self.close(snapshot.spec.session_id)
            raise

    def _take_over(self, session: Session, snapshot: Snapshot) -> None:
        device = self._pool.keys.device
        session.next_chunk, session.events = snapshot.next_chunk, list(snapshot.events)
        session.kept = [replace(item, written=item.written.to(device)) for item in snapshot.kept]
        session.history, session.text = snapshot.history.to(device), snapshot.text.to(device)
        if snapshot.transition is not None:
            start, target = snapshot.transition.start.to(device), snapshot.transition.target.to(device)
            session.transition = replace(snapshot.transition, start=start, target=target)
        with self._lock:
            session.pending.extendleft(reversed(snapshot.pending))
        session.move(SessionState.RUNNING)
        self._recache(session, "restore")
        self._decoder.decode(session.history.unsqueeze(0), session.decoder_state)

    def _schedule(self, spec: SessionSpec) -> StepSchedule:
        own = self.config.schedule
        return own if spec.schedule is None else StepSchedule(spec.schedule, own.shift, own.context)

    def _new_session(self, spec: SessionSpec, schedule: StepSchedule) -> Session:
        return Session(
            spec, schedule, new_cache(self.config, self._pool), self._decoder.start(),
            self.config.serve.decoder_history_frames,
        )

    def _free_closed(self) -> None:
        with self._lock:
            closing, self._closing = self._closing, set()
            gone = [self._sessions.pop(session_id) for session_id in closing if session_id in self._sessions]
        for session in gone:
            session.cache.close()
            if not session.ended:
                session.move(SessionState.CANCELLED)
        if gone:
            self._report_occupancy()

    def _next_batch(self) -> list[Session]:
        now_s = self._clock()
        with self._lock:
            candidates = [
                Candidate(session_id, session.slack_s(self.geometry, now_s), self._batch_key(session))
                for session_id, session in self._sessions.items()
                if session.asked and not session.ended
            ]
            chosen = [self._sessions[i] for i in choose(candidates, self.config.serve.batch_sessions)]
            for session in chosen:
                session.asked = False
        return chosen

    def _batch_key(self, session: Session) -> Hashable:
        return session.schedule.levels(session.next_chunk), session.schedule.resolved_context, len(session.kept)

    def _prepare(self, session: Session) -> None:
        """Bring text and cache to the next chunk: start, prompt changes, transitions."""
        if session.text is None:
            session.text = self._encode(session.spec.prompt)
            session.move(SessionState.RUNNING)
        with self._lock:
            changes = list(session.pending)
            session.pending.clear()
        if changes:
            change = changes[-1]
            detail = {"event_ids": [c.event_id for c in changes], "transition_chunks": change.transition_chunks}
            session.events.append(Event("prompt", session.next_chunk, {**detail, "prompt": change.prompt}))
            session.transition = Transition(
                session.text, self._encode(change.prompt), max(1, change.transition_chunks)
            )
        if session.transition is not None:
            session.transition = session.transition.advance()
            session.text = session.transition.text
            self._recache(session, "prompt")
            if session.transition.done >= session.transition.total:
                session.transition = None
        session.cache.begin(session.next_chunk)

    def _encode(self, prompt: str) -> Tensor:
        return self._text.encode([prompt])

    def _recache(self, session: Session, reason: str) -> None:
        assert session.text is not None
        forwards = recache(self._network, session.cache, session.kept, session.text)
        session.events.append(Event("recache", session.next_chunk, {"reason": reason, "forwards": forwards}))
        self._metrics.inc("diagonal_model_forward_calls_total", forwards)

    def _generate_isolated(self, batch: Sequence[Session]) -> list[ChunkResult]:
        """Generate a batch; when its forward fails, each session alone, so that only the culprit ends."""
        if not batch:
            return []
        started_s = self._clock()
        try:
            done = self._denoise(batch)
        except (RuntimeError, ValueError) as error:
            if len(batch) == 1:
                return [self._fail(batch[0], error)]
            return [result for session in batch for result in self._generate_isolated([session])]
        results = [self._finish(session, done, index, started_s) for index, session in enumerate(batch)]
        elapsed_s = (self._clock() - started_s) / len(batch)
        self._chunk_s = elapsed_s if self._chunk_s == 0.0 else 0.9 * self._chunk_s + 0.1 * elapsed_s
        self._report_occupancy()
        return results

    def _denoise(self, batch: Sequence[Session]) -> DenoisedChunk:
        chunks = [session.next_chunk for session in batch]
        noise = chunk_noise_of(
            self.geometry, [session.spec.seed for session in batch], chunks, self._pool.keys.device
        )
        text = torch.cat([session.text for session in batch if session.text is not None])
        caches = CacheBatch([session.cache for session in batch])
        done = denoise_chunk(self._network, batch[0].schedule, chunks[0], text, caches, noise)
        self._metrics.inc("diagonal_model_forward_calls_total", done.forwards)
        return done

    def _finish(self, session: Session, done: DenoisedChunk, index: int, started_s: float) -> ChunkResult:
        """Decode and emit one session's part of a batch, and move it on; a failure here is this session's alone."""
        chunk = session.next_chunk
        clean, written = done.clean[index].clone(), done.written[index].clone()  # a snapshot holds no neighbour's
        try:
            pixels = self._decode(session, clean)
        except (RuntimeError, ValueError) as error:
            return self._fail(session, error)
        session.remember(KeptChunk(chunk, written, done.written_level), clean)
        session.next_chunk += 1
        now_s = self._clock()
        if session.started_s is None:
            session.started_s = now_s - self.geometry.pixel_start(chunk) / self.geometry.pixel_fps
        last = session.next_chunk == session.total_chunks(self.geometry)
        if last:
            session.move(SessionState.DONE)
        shown = session.shown_pixel_frames(self.geometry, chunk)
        self._metrics.inc("diagonal_frames_generated_total", shown)
        self._metrics.observe("diagonal_chunk_generation_seconds", now_s - started_s)
        applied = [i for e in session.events if e.kind == "prompt" and e.chunk == chunk for i in e.detail["event_ids"]]
        return ChunkResult(
            session.spec.session_id, chunk, pixels[:shown], self.geometry.pixel_start(chunk), now_s - started_s,
            done.forwards, tuple(applied), last,
        )

    def _decode(self, session: Session, clean: Tensor) -> Tensor:
        """Pixels on the CPU; `RuntimeError` when the latents are not finite. Results leave the device here alone."""
        if not bool(torch.isfinite(clean).all()):  # host sync: the emit point
            raise RuntimeError("the generated latents are not finite")
        return self._decoder.decode(clean.unsqueeze(0), session.decoder_state)[0].cpu()

    def _fail(self, session: Session, error: Exception) -> ChunkResult:
        """End one session with its reason; the others go on."""
        session.move(SessionState.FAILED)
        self.close(session.spec.session_id)
        empty = torch.empty((0, self.geometry.pixel_height, self.geometry.pixel_width, 3), dtype=torch.uint8)
        first = self.geometry.pixel_start(session.next_chunk)
        return ChunkResult(session.spec.session_id, session.next_chunk, empty, first, 0.0, 0, (), True, str(error))

    def _report_occupancy(self) -> None:
        stats = self.stats()
        self._metrics.set("diagonal_sessions_active", stats.active_sessions)
        self._metrics.set("diagonal_kv_cache_bytes", stats.cache_bytes)
        self._metrics.set("diagonal_kv_cache_capacity_bytes", stats.cache_capacity_bytes)
