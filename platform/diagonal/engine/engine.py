"""The engine: sessions on one device, one chunk a step, batched where they can share a forward. No Ray inside."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from diagonal.engine.admission import Admission
from diagonal.engine.budget import RECACHE_ONCE, BudgetError, CapacityError, Progress
from diagonal.engine.chunk_maker import ChunkMaker
from diagonal.engine.drift import ReanchorPolicy
from diagonal.engine.model_runner import ModelRunner, Servable
from diagonal.engine.recording import Recording
from diagonal.engine.reporting import EngineReport, EngineStats
from diagonal.engine.session import ChunkResult, IllegalMoveError, Session, SessionInfo, SessionState, decoder_bytes
from diagonal.engine.session_table import SessionTable
from diagonal.engine.snapshot import Snapshot, SnapshotError, check_latents
from diagonal.engine.specs import MAX_EVENTS, MAX_PENDING, PromptChange, SessionSpec
from diagonal.engine.stepper import Health, Stepper
from diagonal.errors import require
from diagonal.metrics import MetricsBackend

__all__ = ["BudgetError", "CapacityError", "Engine", "EngineStats", "Health"]


class Engine:
    """A table of sessions, admission to it, and a stepper that makes their chunks.

    `step`, `warm_up` and `exercise` belong to the one thread that drives the engine; all else may be called from any
    thread, and is done at the next chunk boundary. With `encode_prompts_async`, `open`, `restore`, `interact` and
    `resume` return before new prompts are encoded: their sessions' chunks wait for that, nobody else's.
    """

    def __init__(
        self,
        release: Servable | None = None,
        *,
        device: torch.device | str = "cpu",
        metrics: MetricsBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
        reanchor: ReanchorPolicy | None = None,
        encode_prompts_async: bool = False,
        maker: ChunkMaker | None = None,
    ) -> None:
        if maker is None:
            assert release is not None, "an engine runs a release, or a maker of chunks"
            maker = ModelRunner(release, device, release.config.serve.max_sessions)
        self.maker, self._clock, self._encode_prompts_async = maker, clock, encode_prompts_async
        self.config, self.geometry, self.identity = maker.config, maker.config.geometry, maker.identity
        self.table = SessionTable()
        self.admission = Admission(self.config, maker.window_chunks, self.table, clock)
        self.report = EngineReport(metrics, self.table, self.admission, maker.pool)
        policy = reanchor or ReanchorPolicy.of(self.config.serve, maker.window_chunks)
        self.stepper = Stepper(maker, self.table, self.admission.cost, self.report, clock, policy)
        self.report.occupancy()

    def step(self) -> list[ChunkResult]:
        """Generate the next chunk of the sessions with least slack among those that asked; [] when none did."""
        return self.stepper.step()

    def warm_up(self) -> None:
        """Measure what chunks and re-caches cost, by kind and batch size, before the first session comes."""
        self.stepper.warm_up()

    def exercise(self) -> bool:
        """Make one chunk for nobody; whether that went well, which also is what `health` then says."""
        return self.stepper.exercise()

    def health(self) -> Health:
        """Unhealthy after three failed chunks in a row, until one or `exercise` succeeds."""
        return self.stepper.health()

    def open(self, spec: SessionSpec) -> None:
        """Accept a session. `FieldError` on a wrong field or an id in use; `CapacityError` when all slots are taken,
        `BudgetError` when a paced session would not leave everybody enough time."""
        schedule = self.admission.schedule_of(spec.schedule)
        with self.table.lock:
            admitted = self.admission.admit_new(spec, schedule)
            session = self.maker.new_session(spec, admitted, admitted != schedule)
            if session.shortened:
                session.log("schedule", steps=admitted.steps, cause="overload")
                self.report.metrics.inc("diagonal_schedules_shortened_total")
            session.save(self.geometry, None)
            self.table.sessions[spec.session_id] = session
        self._encode_prompts(session)
        self.report.occupancy()

    def check_room(self, spec: SessionSpec) -> None:
        """Raise what `open` would raise now; nothing changes."""
        with self.table.lock:
            self.admission.admit_new(spec, self.admission.schedule_of(spec.schedule))

    def restore(self, snapshot: Snapshot, ahead_s: float | None = None) -> None:
        """Continue a session of another engine, from the chunk after its snapshot; its cache is rebuilt then.

        `ahead_s` is the media that its viewer has left now, if the caller knows better than the snapshot does.
        Errors as `open`, and `SnapshotError` when release, configuration or latents do not fit.
        """
        self.identity.check(snapshot.identity, "snapshot.identity")
        check_latents(snapshot, self.geometry, self.maker.window_chunks)
        spec, total = snapshot.spec, self.admission.total_chunks(snapshot.spec)
        if total is not None and snapshot.next_chunk >= total:
            raise SnapshotError(f"snapshot.next_chunk = {snapshot.next_chunk}: allowed is one below {total}, the end")
        with self.table.lock:
            self.admission.check_new(spec.session_id)
            recaches = 1.0 if snapshot.timeline.in_transition else RECACHE_ONCE
            progress = Progress(snapshot.schedule, snapshot.next_chunk, total, recaches)
            self.admission.admit(spec, progress, may_shorten=False)
            session = self.maker.new_session(spec, snapshot.schedule, snapshot.shortened)
            session.take_over(snapshot)
            if snapshot.next_chunk:
                session.rebuild.reason = "restore"
                session.log("restore")
            self._begin_playback(session, snapshot.ahead_s if ahead_s is None else ahead_s)
            self.table.sessions[spec.session_id] = session
        self._encode_prompts(session)
        self.report.occupancy()

    def interact(self, session_id: str, change: PromptChange) -> None:
        """Queue a prompt change for the next chunk, of a paused session for the first one after it is resumed.

        An event that already waits is not queued again. `KeyError` for an unknown session, `FieldError` when too many
        changes wait.
        """
        with self.table.lock:
            session = self.table[session_id]
            pending = session.prompt.pending
            if all(change.event_id != waiting.event_id for waiting in pending):
                few = f"one of at most {MAX_PENDING} that wait for a chunk"
                require(len(pending) < MAX_PENDING, "event_id", change.event_id, few)
                pending.append(change)
        if session.live:
            self._encode_prompts(session)

    def request(self, session_id: str, chunk: int | None = None) -> None:
        """Ask for the session's chunks up to that number, or for the one that is begun next; of a paused session for
        when it is resumed. `KeyError` for an unknown one."""
        with self.table.lock:
            session = self.table[session_id]
            progress = session.progress
            if not session.asks(self.geometry):
                progress.asked_s = self._clock()
            progress.requested_chunk = max(progress.requested_chunk, progress.making if chunk is None else chunk)
        self.maker.encoded.set()

    def reanchor(self, session_id: str) -> None:
        """Rebuild the session's cache from sink and newest chunk alone, before the next chunk; `KeyError` for an
        unknown session."""
        with self.table.lock:
            self.table[session_id].rebuild.reanchor_reason = "asked"

    def pause(self, session_id: str) -> None:
        """Free the session's cache and decoder at the next chunk boundary; only its snapshot stays.

        Of a session that waits, begins or is in a prompt change too: what was asked and what is pending stays so.
        Pausing a paused session is nothing. `KeyError` for an unknown session, `IllegalMoveError` for one that ended.
        """
        with self.table.lock:
            session = self.table[session_id]
            if session.ended:
                raise IllegalMoveError(session_id, session.state, SessionState.PAUSED)
            session.pausing = session.state is not SessionState.PAUSED

    def resume(self, session_id: str) -> None:
        """Continue a paused session: its cache is rebuilt before its next chunk.

        Errors as `pause`, and as `open` where there is no room; it then stays paused.
        """
        with self.table.lock:
            session = self.table[session_id]
            if session.ended:
                raise IllegalMoveError(session_id, session.state, SessionState.RUNNING)
            session.pausing = False
            if session.state is not SessionState.PAUSED:
                return
            progress, begun = session.demand_progress(self.geometry, self._clock()), session.progress.next_chunk > 0
            progress = replace(progress, recaches=max(progress.recaches, RECACHE_ONCE))
            self.admission.admit(session.spec, progress, may_shorten=False)
            session.move(SessionState.RUNNING if begun else SessionState.QUEUED)
            session.rebuild.reason = "resume" if begun else ""
            self._begin_playback(session, session.ahead_s)
            session.log("resume")
        self._encode_prompts(session)
        self.report.occupancy()

    def close(self, session_id: str) -> None:
        """End a session; its cache is free within one chunk, also while one is being made. Unknown ids are ignored."""
        self.table.close(session_id)

    def snapshot(self, session_id: str) -> Snapshot:
        """What another engine needs to continue after the newest finished chunk, with the prompt changes that wait.

        `KeyError` for an unknown session, `FieldError` for one that has ended.
        """
        with self.table.lock:
            session = self.table[session_id]
            require(not session.ended, "session", session_id, "a session that has not ended")
            assert session.saved is not None
            return replace(session.saved, pending=tuple(session.prompt.pending))

    def recording(self, session_id: str) -> Recording:
        """The event log up to the newest finished chunk, for `engine.replay`.

        `KeyError` for an unknown session, `FieldError` for one that is not recorded, or longer than a log may be.
        """
        with self.table.lock:
            session = self.table[session_id]
            require(session.spec.record, "session", session_id, "a session that was opened with record")
            require(len(session.events) < MAX_EVENTS, "session", session_id, f"one of fewer than {MAX_EVENTS} events")
            chunks = session.progress.next_chunk
            events = tuple(event for event in session.events if event.chunk < chunks)
            return Recording(session.identity, session.spec, session.schedule, chunks, events)

    def latents(self, session_id: str) -> Tensor:
        """The newest clean latents `[c, f, h, w]` that a session keeps; `KeyError` for an unknown session,
        `FieldError` before its first chunk."""
        with self.table.lock:
            history = self.table[session_id].latents.history
        require(history is not None, "session", session_id, "a session that has finished a chunk")
        assert history is not None
        return history

    def info(self, session_id: str) -> SessionInfo:
        """State, schedule and size of one session; `KeyError` for an unknown one."""
        with self.table.lock:
            session = self.table[session_id]
            ahead_s = session.slack_s(self.geometry, self._clock()) if session.live else session.ahead_s
            return SessionInfo(
                session.state,
                session.progress.next_chunk,
                session.schedule.steps,
                session.shortened,
                None if ahead_s == -inf else ahead_s,
                session.cache.bytes_in_use,
                decoder_bytes(session.decoder_state),
                session.latents.bytes,
                session.drift.ratios,
            )

    def stats(self) -> EngineStats:
        """Sessions, slots, bytes and predicted load now."""
        return self.report.stats()

    def _begin_playback(self, session: Session, ahead_s: float | None) -> None:
        session.playback.begin(self._clock(), session.media_s(self.geometry), ahead_s)

    def _encode_prompts(self, session: Session) -> None:
        """Have its prompts encoded, on the thread that does that: never while the engine's step waits for the lock."""
        self.maker.request_prompts(session)
        if not self._encode_prompts_async:
            wait(session.prompt.embeddings.values())
