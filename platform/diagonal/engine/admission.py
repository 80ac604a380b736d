"""Admission: who may join the sessions of a table, by slots and by the measured real-time budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from diagonal.config import Config
from diagonal.engine.budget import Budget, CapacityError, ChunkKind, Demand, Progress, bounded_s, busy_share, demand_of
from diagonal.engine.session import Session
from diagonal.engine.session_table import SessionTable
from diagonal.engine.specs import SessionSpec
from diagonal.errors import require
from diagonal.schedule import StepSchedule

_LEAST_LEFT = 0.1  # share of the device that sessions without a pace are expected to get at least


class Admission:
    """Decides over a table's sessions, whose lock its caller has."""

    def __init__(self, config: Config, window_chunks: int, table: SessionTable, clock: Callable[[], float]) -> None:
        self._config, self._window_chunks, self._table, self._clock = config, window_chunks, table, clock
        self.slots = config.serve.max_sessions
        self.budget = Budget(share=config.serve.budget_share, batch_limit=config.serve.batch_sessions)
        self.cost = self.budget.model

    def schedule_of(self, steps: str | None) -> StepSchedule:
        own = self._config.schedule
        return own if steps is None else replace(own, steps=steps)

    def total_chunks(self, spec: SessionSpec) -> int | None:
        return None if spec.pixel_frames is None else self._config.geometry.chunks_for(spec.pixel_frames)

    def check_new(self, session_id: str) -> None:
        """`FieldError` for an id in use, `CapacityError` where no more sessions may be kept, paused ones included."""
        require(session_id not in self._table.sessions, "session_id", session_id, "an id that is not in use")
        most = self.slots + self._config.serve.max_paused_sessions
        if len(self._table.sessions) >= most:
            raise CapacityError(most, self._slot_free_s())

    def admit_new(self, spec: SessionSpec, schedule: StepSchedule) -> StepSchedule:
        """The schedule that a new session is to run; errors as `Engine.open`."""
        self.check_new(spec.session_id)
        return self.admit(spec, Progress(schedule, 0, self.total_chunks(spec)), spec.schedule is None)

    def admit(self, spec: SessionSpec, progress: Progress, may_shorten: bool) -> StepSchedule:
        """The schedule to run: the one in `progress`, or under overload the configured shorter one."""
        if len(self._table.live) >= self.slots:
            raise CapacityError(self.slots, self._slot_free_s())
        if not spec.paced:
            return progress.schedule
        steps = self._config.serve.degraded_steps if may_shorten else ""
        return self.budget.schedule_of(
            self._playing(),
            lambda schedule: self._demand(replace(progress, schedule=schedule)),
            progress.schedule,
            self.schedule_of(steps) if steps else None,
        )

    def busy(self) -> float:
        """Predicted busy seconds per second of media of the playing sessions."""
        return busy_share(self.cost, self._playing(), self.budget.batch_limit)

    def _demand(self, progress: Progress) -> Demand:
        return demand_of(progress, self._config.geometry, self._window_chunks, self.cost)

    def _playing(self) -> list[Demand]:
        now_s = self._clock()
        return [self._demand(one.demand_progress(self._config.geometry, now_s)) for one in self._table.playing]

    def _slot_free_s(self) -> float:
        """When the first session that has a slot is expected to end."""
        now_s, left = self._clock(), max(_LEAST_LEFT, 1.0 - self.busy())
        return bounded_s(min((self._remaining_s(one, now_s, left) for one in self._table.live), default=0.0))

    def _remaining_s(self, session: Session, now_s: float, left: float) -> float:
        if session.ended or self._table.is_closing(session):
            return 0.0
        total, next_chunk = session.total_chunks(self._config.geometry), session.progress.next_chunk
        if session.spec.paced or total is None:
            return session.demand_progress(self._config.geometry, now_s).remaining_s
        kind = ChunkKind.of(session.schedule, next_chunk, self._window_chunks)
        return (total - next_chunk) * self.cost.step_s(kind, 1) / left
