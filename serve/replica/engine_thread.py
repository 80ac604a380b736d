"""The one thread that drives an engine; everybody else asks from outside and is told what came of it."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from diagonal.engine.engine import EngineStats, Health
from diagonal.engine.recording import Recording
from diagonal.engine.session import ChunkResult, PromptChange, SessionSpec
from diagonal.engine.snapshot import Snapshot

_LOG = logging.getLogger("ray.serve")
_IDLE_S = 0.5  # an engine with nothing asked for is woken by a request; this bounds how late a closed session is freed
TICK_S = 1.0  # how often `tick` is called
_LATE = 3  # so many chunk times without a result, and the step is late: the machine may be busy
_HUNG = 12  # so many times as long while the process runs, and the engine hangs
_SMOOTHING = 0.1


class EngineLike(Protocol):
    """What this thread and the replica need of `diagonal.engine.engine.Engine`."""

    def open(self, spec: SessionSpec) -> None: ...

    def check_room(self, spec: SessionSpec) -> None: ...

    def restore(self, snapshot: Snapshot, ahead_s: float | None = None) -> None: ...

    def interact(self, session_id: str, change: PromptChange) -> None: ...

    def request(self, session_id: str, chunk: int | None = None) -> None: ...

    def pause(self, session_id: str) -> None: ...

    def resume(self, session_id: str) -> None: ...

    def recording(self, session_id: str) -> Recording: ...

    def close(self, session_id: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def health(self) -> Health: ...

    def step(self) -> Sequence[ChunkResult]: ...

    def exercise(self) -> bool: ...


class EngineThread:
    """Steps the engine while anything is asked for, and hands each result to `deliver` (called on this thread).

    `chunk_s` is the media in a chunk: what a step may take when nothing is late.
    """

    def __init__(
        self,
        engine: EngineLike,
        deliver: Callable[[ChunkResult], None],
        chunk_s: float = 0.75,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._deliver = engine, deliver
        self._chunk_s, self._clock = chunk_s, clock
        self._wake, self._stop, self._exercise = threading.Event(), threading.Event(), threading.Event()
        self._step_s, self._busy_since_s, self._proved_s, self._well = 0.0, float("inf"), clock(), True
        self._ticked_s, self._ran_s, self._ran_for_s = clock(), 0.0, float("inf")  # of the step that began then
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    @property
    def deadline_s(self) -> float:
        """How long a step takes at most when nothing is late: three chunks' media, or three usual steps."""
        return _LATE * max(self._chunk_s, self._step_s)

    @property
    def healthy(self) -> bool:
        """Whether the thread lives, its step is not late, and chunks come out.

        Chunks that failed in a row may be their prompts' fault: the engine has the time of one exercise to show it.
        """
        return not self.lost and not self.late

    @property
    def lost(self) -> bool:
        """Whether its process is to be replaced: it ended, makes no chunks any more, or hangs.

        A late step may still come. It hangs once it is late by far in time that the process itself ran: one that was
        stopped, or got no processor, is not to blame.
        """
        hangs = self.late and self._ran_s > _HUNG * self.deadline_s
        return not self.alive or hangs or not self._well

    @property
    def late(self) -> bool:
        """Whether the step that is under way takes longer than `deadline_s`."""
        return self._clock() - self._busy_since_s > self.deadline_s

    def tick(self) -> float:
        """Note, about every `TICK_S`, how long the step has run; how much of the time since the last tick was late.

        A tick that comes late shows that the process did not run meanwhile: it counts as two at most.
        """
        now_s, late_from_s = self._clock(), self._busy_since_s + self.deadline_s
        since_s, self._ticked_s = self._ticked_s, now_s
        if self._busy_since_s != self._ran_for_s:
            self._ran_for_s, self._ran_s = self._busy_since_s, 0.0
        if now_s > self._busy_since_s:
            self._ran_s += min(now_s - max(since_s, self._busy_since_s), 2 * TICK_S)
        return max(0.0, now_s - max(since_s, late_from_s))

    def proved_within(self, seconds: float) -> bool:
        """Whether the engine made a chunk, for a session or for nobody, in the last so many seconds."""
        return self._clock() - self._proved_s <= seconds

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End after the step that is under way."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def wake(self) -> None:
        """Something was asked of the engine."""
        self._wake.set()

    def ask_exercise(self) -> None:
        """Have the engine make a chunk for nobody; `proved_within` then says whether it did."""
        self._exercise.set()
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._step():
                    self._wake.wait(_IDLE_S)
                    self._wake.clear()
        except Exception as error:  # the replica's edge: whatever it was, the replica must say that it is not well
            self.error = error
            _LOG.error("the engine's thread ended: %s", _where(error))

    def _step(self) -> bool:
        """One step; whether it made anything. An engine whose chunks failed must show that it still can."""
        started_s = self._busy_since_s = self._clock()
        results = self._engine.step()
        busy_s = self._clock() - started_s
        if any(len(result.pixels) for result in results):
            self._proved_s = self._clock()
            self._step_s = busy_s if self._step_s == 0.0 else self._step_s + _SMOOTHING * (busy_s - self._step_s)
        for result in results:
            self._deliver(result)
        if self._exercise.is_set() or not self._engine.health().healthy:
            self._exercise.clear()
            self._busy_since_s = self._clock()
            if self._engine.exercise():
                self._proved_s = self._clock()
        self._well = self._engine.health().healthy
        self._busy_since_s = float("inf")
        return bool(results)


def _where(error: BaseException) -> str:
    """An error's kind and the way to it, innermost first, in one line; its text could hold a prompt."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return " < ".join([type(error).__name__, *(f"{Path(one.filename).name}:{one.lineno}" for one in frames)])
