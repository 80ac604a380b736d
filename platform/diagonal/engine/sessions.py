"""The half of an engine that any thread may call: who is admitted, and what is asked of each session."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, replace
from math import inf

from torch import Tensor

from diagonal.engine.admission import (
    RECACHE_ONCE,
    Budget,
    CapacityError,
    ChunkKind,
    Demand,
    Progress,
    bounded_s,
    busy_share,
    demand_of,
)
from diagonal.engine.chunk_maker import ChunkMaker
from diagonal.engine.recording import Recording
from diagonal.engine.session import IllegalMoveError, Session, SessionInfo, SessionState, decoder_bytes
from diagonal.engine.snapshot import Snapshot, SnapshotError, check_latents
from diagonal.engine.specs import MAX_EVENTS, MAX_PENDING, PromptChange, SessionSpec
from diagonal.errors import require
from diagonal.metrics import MetricsBackend
from diagonal.schedule import StepSchedule

_LEAST_LEFT = 0.1  # share of the device that sessions without a pace are expected to get at least


@dataclass(frozen=True)
class EngineStats:
    """A reading of the engine; `chunk_s` is the moving mean of a chunk's generation time, 0 before the first.

    `active_sessions` hold a slot, `paused_sessions` do not. `busy` is the predicted busy time per second of media of
    the playing ones.
    """

    active_sessions: int
    free_slots: int
    cache_bytes: int
    cache_capacity_bytes: int
    chunk_s: float
    paused_sessions: int = 0
    state_bytes: int = 0
    snapshot_bytes: int = 0
    busy: float = 0.0


class Sessions:
    """Admits sessions and takes what is asked of them; the engine's own thread does it at the next chunk boundary."""

    def __init__(
        self, maker: ChunkMaker, metrics: MetricsBackend, clock: Callable[[], float], read_aside: bool
    ) -> None:
        self.config, self.geometry, self.identity = maker.config, maker.geometry, maker.identity
        self._maker, self._metrics, self._clock, self._read_aside = maker, metrics, clock, read_aside
        serve = self.config.serve
        self._slots = serve.max_sessions
        self._budget = Budget(share=serve.budget_share, batch_limit=serve.batch_sessions)
        self._cost = self._budget.model
        self._sessions: dict[str, Session] = {}
        self._closing: set[str] = set()
        self._lock = threading.Lock()
        self._chunk_s = 0.0
        self._report_occupancy()

    def open(self, spec: SessionSpec) -> None:
        """Accept a session. `FieldError` on a wrong field or an id in use; `CapacityError` when all slots are taken,
        `BudgetError` when a paced session would not leave everybody enough time."""
        schedule = self._schedule(spec.schedule)
        with self._lock:
            admitted = self._admit_new(spec, schedule)
            session = self._maker.new_session(spec, admitted, admitted != schedule)
            if session.shortened:
                session.log("schedule", steps=admitted.steps, cause="overload")
                self._metrics.inc("diagonal_schedules_shortened_total")
            session.save(self.geometry, None)
            self._sessions[spec.session_id] = session
        self._read(session)
        self._report_occupancy()

    def check_room(self, spec: SessionSpec) -> None:
        """Raise what `open` would raise now; nothing changes."""
        with self._lock:
            self._admit_new(spec, self._schedule(spec.schedule))

    def restore(self, snapshot: Snapshot, ahead_s: float | None = None) -> None:
        """Go on with a session of another engine, from the chunk after its snapshot; its cache is written anew then.

        `ahead_s` is the media that its viewer has left now, if that is known better than the snapshot does.
        Errors as `open`, and `SnapshotError` when release, configuration or latents do not fit.
        """
        self.identity.check(snapshot.identity, "snapshot.identity")
        check_latents(snapshot, self.geometry, self._maker.window_chunks)
        spec, total = snapshot.spec, self._total_chunks(snapshot.spec)
        if total is not None and snapshot.next_chunk >= total:
            raise SnapshotError(f"snapshot.next_chunk = {snapshot.next_chunk}: allowed is one below {total}, the end")
        with self._lock:
            self._check_new(spec.session_id)
            recaches = 1.0 if snapshot.timeline.moving else RECACHE_ONCE
            self._admit(spec, Progress(snapshot.schedule, snapshot.next_chunk, total, recaches), may_shorten=False)
            session = self._maker.new_session(spec, snapshot.schedule, snapshot.shortened)
            session.take_over(snapshot)
            session.saved = snapshot
            if session.next_chunk:
                session.stale = "restore"
                session.log("restore")
            session.play_from(self.geometry, snapshot.ahead_s if ahead_s is None else ahead_s, self._clock())
            self._sessions[spec.session_id] = session
        self._read(session)
        self._report_occupancy()

    def interact(self, session_id: str, change: PromptChange) -> None:
        """Queue a prompt change for the next chunk, of a paused session for the first one after it is resumed.

        An event that already waits is not queued again. `KeyError` for an unknown session, `FieldError` when too many
        changes wait.
        """
        with self._lock:
            session = self._sessions[session_id]
            pending = session.pending
            if all(change.event_id != waiting.event_id for waiting in pending):
                few = f"one of at most {MAX_PENDING} that wait for a chunk"
                require(len(pending) < MAX_PENDING, "event_id", change.event_id, few)
                pending.append(change)
        if session.live:
            self._read(session)

    def request(self, session_id: str, chunk: int | None = None) -> None:
        """Ask for the session's chunks up to that number, or for the one that is begun next; of a paused session for
        when it is resumed. `KeyError` for an unknown one."""
        with self._lock:
            session = self._sessions[session_id]
            if not session.asks(self.geometry):
                session.asked_s = self._clock()
            session.wanted = max(session.wanted, session.making if chunk is None else chunk)
        self._maker.prompts.news.set()

    def reanchor(self, session_id: str) -> None:
        """Write the session's cache anew from sink and newest chunk alone, before the next chunk; `KeyError` for an
        unknown session."""
        with self._lock:
            self._sessions[session_id].reanchor = "asked"

    def pause(self, session_id: str) -> None:
        """Free the session's cache and decoder at the next chunk boundary; only its snapshot stays.

        Of a session that waits, begins or is in a prompt change too: what was asked and what is pending stays so.
        Pausing a paused session is nothing. `KeyError` for an unknown session, `IllegalMoveError` for one that ended.
        """
        with self._lock:
            session = self._sessions[session_id]
            if session.ended:
                raise IllegalMoveError(session_id, session.state, SessionState.PAUSED)
            session.pausing = session.state is not SessionState.PAUSED

    def resume(self, session_id: str) -> None:
        """Go on with a paused session: its cache is written anew before its next chunk.

        Errors as `pause`, and as `open` where there is no room; it then stays paused.
        """
        with self._lock:
            session = self._sessions[session_id]
            if session.ended:
                raise IllegalMoveError(session_id, session.state, SessionState.RUNNING)
            session.pausing = False
            if session.state is not SessionState.PAUSED:
                return
            progress = session.progress(self.geometry, self._clock())
            progress = replace(progress, recaches=max(progress.recaches, RECACHE_ONCE))
            self._admit(session.spec, progress, may_shorten=False)
            session.move(SessionState.RUNNING if session.next_chunk else SessionState.QUEUED)
            session.stale = "resume" if session.next_chunk else ""
            session.play_from(self.geometry, session.ahead_s, self._clock())
            session.log("resume")
        self._read(session)
        self._report_occupancy()

    def close(self, session_id: str) -> None:
        """End a session; its cache is free within one chunk, also while one is being made. Unknown ids are ignored."""
        with self._lock:
            if session_id in self._sessions:
                self._closing.add(session_id)

    def snapshot(self, session_id: str) -> Snapshot:
        """What another engine needs to go on after the newest finished chunk, with the prompt changes that wait.

        `KeyError` for an unknown session, `FieldError` for one that has ended.
        """
        with self._lock:
            session = self._sessions[session_id]
            require(not session.ended, "session", session_id, "a session that has not ended")
            assert session.saved is not None
            return replace(session.saved, pending=tuple(session.pending))

    def recording(self, session_id: str) -> Recording:
        """The event log up to the newest finished chunk, for `engine.replay`.

        `KeyError` for an unknown session, `FieldError` for one that is not recorded, or longer than a log may be.
        """
        with self._lock:
            session = self._sessions[session_id]
            require(session.spec.record, "session", session_id, "a session that was opened with record")
            require(len(session.events) < MAX_EVENTS, "session", session_id, f"one of fewer than {MAX_EVENTS} events")
            assert session.saved is not None
            events = tuple(event for event in session.events if event.chunk < session.next_chunk)
            return Recording(session.identity, session.spec, session.schedule, session.next_chunk, events)

    def latents(self, session_id: str) -> Tensor:
        """The newest clean latents `[c, f, h, w]` that a session keeps; `KeyError` for an unknown session,
        `FieldError` before its first chunk."""
        with self._lock:
            history = self._sessions[session_id].history
        require(history is not None, "session", session_id, "a session that has finished a chunk")
        assert history is not None
        return history

    def info(self, session_id: str) -> SessionInfo:
        """State, schedule and size of one session; `KeyError` for an unknown one."""
        with self._lock:
            session = self._sessions[session_id]
            ahead_s = session.slack_s(self.geometry, self._clock()) if session.live else session.ahead_s
            return SessionInfo(
                session.state,
                session.next_chunk,
                session.schedule.steps,
                session.shortened,
                None if ahead_s == -inf else ahead_s,
                session.cache.bytes_in_use,
                decoder_bytes(session.decoder_state),
                session.latents_bytes(),
                session.drift.ratios,
            )

    def stats(self) -> EngineStats:
        """Sessions, slots, bytes and predicted load now."""
        with self._lock:
            live = [session for session in self._sessions.values() if session.live]
            paused = [session for session in self._sessions.values() if not session.live]
            busy = busy_share(self._cost, self._playing(), self._budget.batch_limit)
            state_bytes = sum(s.device_bytes() + s.latents_bytes() for s in live)
        return EngineStats(
            len(live),
            self._slots - len(live),
            self._maker.pool.bytes_in_use,
            self._maker.pool.capacity_bytes,
            self._chunk_s,
            len(paused),
            state_bytes,
            sum(session.latents_bytes() for session in paused),
            busy,
        )

    def _read(self, session: Session) -> None:
        """Have its prompts encoded, on the thread that does that: never while the engine's step waits for the lock."""
        self._maker.ask_texts(session)
        if not self._read_aside:
            wait(session.texts.values())

    def _schedule(self, steps: str | None) -> StepSchedule:
        own = self.config.schedule
        return own if steps is None else StepSchedule(steps, own.shift, own.context)

    def _total_chunks(self, spec: SessionSpec) -> int | None:
        return None if spec.pixel_frames is None else self.geometry.chunks_for(spec.pixel_frames)

    def _check_new(self, session_id: str) -> None:
        require(session_id not in self._sessions, "session_id", session_id, "an id that is not in use")
        most = self._slots + self.config.serve.max_paused_sessions
        if len(self._sessions) >= most:
            raise CapacityError(most, self._slot_free_s())

    def _admit_new(self, spec: SessionSpec, schedule: StepSchedule) -> StepSchedule:
        self._check_new(spec.session_id)
        return self._admit(spec, Progress(schedule, 0, self._total_chunks(spec)), spec.schedule is None)

    def _admit(self, spec: SessionSpec, progress: Progress, may_shorten: bool) -> StepSchedule:
        """The schedule to run: the one in `progress`, or under overload the configured shorter one."""
        if sum(session.live for session in self._sessions.values()) >= self._slots:
            raise CapacityError(self._slots, self._slot_free_s())
        if not spec.paced:
            return progress.schedule
        steps = self.config.serve.overload_steps if may_shorten else ""
        return self._budget.schedule_of(
            self._playing(),
            lambda schedule: self._demand(replace(progress, schedule=schedule)),
            progress.schedule,
            self._schedule(steps) if steps else None,
        )

    def _demand(self, progress: Progress) -> Demand:
        return demand_of(progress, self.geometry, self._maker.window_chunks, self._cost)

    def _playing(self) -> list[Demand]:
        now_s = self._clock()
        sessions = [session for session in self._sessions.values() if session.playing]
        return [self._demand(session.progress(self.geometry, now_s)) for session in sessions]

    def _slot_free_s(self) -> float:
        """When the first session that holds a slot is expected to end."""
        now_s = self._clock()
        left = max(_LEAST_LEFT, 1.0 - busy_share(self._cost, self._playing(), self._budget.batch_limit))
        ends = [self._remaining_s(session, now_s, left) for session in self._sessions.values() if session.live]
        return bounded_s(min(ends, default=0.0))

    def _remaining_s(self, session: Session, now_s: float, left: float) -> float:
        if session.ended or session.spec.session_id in self._closing:
            return 0.0
        total = session.total_chunks(self.geometry)
        if session.spec.paced or total is None:
            return session.progress(self.geometry, now_s).remaining_s
        kind = ChunkKind.of(session.schedule, session.next_chunk, self._maker.window_chunks)
        return (total - session.next_chunk) * self._cost.step_s(kind, 1) / left

    def _report_occupancy(self) -> None:
        stats = self.stats()
        self._metrics.set("diagonal_sessions_active", stats.active_sessions)
        self._metrics.set("diagonal_sessions_paused", stats.paused_sessions)
        self._metrics.set("diagonal_kv_cache_bytes", stats.cache_bytes)
        self._metrics.set("diagonal_kv_cache_capacity_bytes", stats.cache_capacity_bytes)
        self._metrics.set("diagonal_session_state_bytes", stats.state_bytes)
        self._metrics.set("diagonal_snapshot_bytes", stats.snapshot_bytes)
        self._metrics.set("diagonal_budget_used_ratio", stats.busy)
        self._metrics.set("diagonal_budget_limit_ratio", self._budget.share)

    def _report_step(self, frames: int, busy_s: float) -> None:
        """So many pixel frames came out of a step."""
        self._metrics.inc("diagonal_generation_busy_seconds_total", busy_s)
        self._metrics.inc("diagonal_generated_media_seconds_total", frames / self.geometry.pixel_fps)
        if frames and busy_s > 0:
            self._metrics.set("diagonal_generation_frames_per_second", frames / busy_s)
        self._report_occupancy()

    def _report_slack(self, session: Session, now_s: float) -> None:
        """A chunk is made: what its viewer, if it has one who waits, still had to play."""
        if session.spec.paced and session.started_s is not None:
            slack_s = max(0.0, session.slack_s(self.geometry, now_s))
            self._metrics.observe("diagonal_playout_slack_seconds", slack_s)
