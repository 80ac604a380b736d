"""A simulated replica: the real engine, whose steps take simulated time, and its encoders."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable

from diagonal.config import Config
from diagonal.engine.budget import CostModel
from diagonal.engine.engine import CapacityError, Engine
from diagonal.engine.session import ChunkResult
from diagonal.engine.snapshot import Snapshot
from diagonal.engine.specs import PromptChange, SessionSpec
from diagonal.evaluate.simulation.chunk_times import Draws
from diagonal.evaluate.simulation.clock import Calendar
from diagonal.evaluate.simulation.maker import SimulatedMaker

ENCODE_THREADS = 2
_RECENTLY_S = 10.0  # as `serve.replica.replica` counts refusals for autoscaling


class SimulatedReplica:
    """Sessions on one device. `deliver(result, at_s)` gets each chunk, encoded at that time.

    A step begins with `Stepper.launch`, and ends with `Stepper.complete` as much later as its maker says that it took.
    With the `measured` costs of an equal replica it is not warmed up itself.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        draws: Draws,
        calendar: Calendar,
        deliver: Callable[[ChunkResult, float], None],
        measured: CostModel | None = None,
    ) -> None:
        self.name, self._draws, self._calendar, self._deliver = name, draws, calendar, deliver
        self._maker = SimulatedMaker(config, draws)
        self.engine = Engine(maker=self._maker, clock=self._now_s)
        if measured is None:
            self.engine.warm_up()
        else:
            self.engine.admission.cost.copy_from(measured)
        self._maker.scatter()
        self._encoders, self._changes = [0.0] * ENCODE_THREADS, itertools.count()
        self._refused_at_s: deque[float] = deque(maxlen=1000)
        self._stepping = self.lost = False
        self._busy_s = 0.0

    def take_busy_s(self) -> float:
        """Seconds of steps that ended since this was asked last."""
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s

    def _now_s(self) -> float:
        return self._calendar.now_s + self._maker.spent_s

    @property
    def sessions(self) -> int:
        return len(self.engine.table.sessions)

    def load(self) -> tuple[float, float, float, float]:
        """Sessions, slots, the share of the budget that playing ones take, and refusals of late, for autoscaling."""
        admission, since_s = self.engine.admission, self._calendar.now_s - _RECENTLY_S
        refused = sum(at_s > since_s for at_s in self._refused_at_s)
        return float(self.sessions), float(admission.slots), admission.busy() / admission.budget.share, float(refused)

    def open(self, name: str, pixel_frames: int | None, snapshot: Snapshot | None = None, ahead_s: float = 0.0) -> None:
        """Admit a session, or continue one of another replica; `CapacityError` or `BudgetError`."""
        try:
            if snapshot is None:
                self.engine.open(SessionSpec(name, "a prompt", 0, pixel_frames))
            else:
                self.engine.restore(snapshot, ahead_s)
        except CapacityError:
            self._refused_at_s.append(self._calendar.now_s)
            raise

    def request(self, name: str) -> None:
        """Ask for its next chunk; of an unknown session for nothing."""
        if name in self.engine.table.sessions:
            self.engine.request(name)
            if not self._stepping and not self.lost:
                self._stepping = True  # others that ask at this very moment are in the same step, as behind the lock
                self._calendar.at(self._calendar.now_s, self._launch)

    def change(self, name: str, transition_chunks: int) -> None:
        """Change its prompt with the next chunk."""
        if name in self.engine.table.sessions:
            self.engine.interact(name, PromptChange(str(next(self._changes)), "another prompt", transition_chunks))

    def close(self, name: str) -> None:
        """End a session; its slot is free at the next chunk boundary."""
        self.engine.close(name)
        if not self._stepping:
            self.engine.table.settle(self._maker, self._calendar.now_s)

    def _launch(self) -> None:
        """Begin a batch and let its time pass; idle where nobody asks."""
        due = 0 if self.lost else self.engine.stepper.launch()
        if not due:
            self._stepping = False
            return
        spent_s = self._maker.take_spent_s()
        self._calendar.after(spent_s, self._complete, due, spent_s)

    def _complete(self, due: int, spent_s: float) -> None:
        """The batch is done: hand its chunks to the encoders, and begin the next."""
        if self.lost:
            return
        now_s = self._calendar.now_s
        results = self.engine.stepper.complete(due, now_s - spent_s)
        self._busy_s += spent_s
        for result in results:
            ready_s = max(now_s, self._encoders[0]) + self._draws.times.encode_s
            heapq.heapreplace(self._encoders, ready_s)
            self._deliver(result, ready_s)
        self._launch()
