"""The one thread that drives an engine; everybody else asks from outside and is told what came of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from diagonal.engine.engine import EngineStats
from diagonal.engine.session import ChunkResult, PromptChange, SessionSpec
from diagonal.metrics import MetricSink

_LOG = logging.getLogger("ray.serve")
_IDLE_S = 0.5  # an engine with nothing asked for is woken by a request; this bounds how late a closed session is freed


class EngineLike(Protocol):
    """What this thread needs of `diagonal.engine.engine.Engine`."""

    def open(self, spec: SessionSpec) -> None: ...

    def interact(self, session_id: str, change: PromptChange) -> None: ...

    def request(self, session_id: str) -> None: ...

    def close(self, session_id: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def step(self) -> Sequence[ChunkResult]: ...


class EngineThread:
    """Steps the engine while anything is asked for, and hands each result to `deliver` (called on this thread)."""

    def __init__(
        self, engine: EngineLike, deliver: Callable[[ChunkResult], None], metrics: MetricSink, fps: int
    ) -> None:
        self._engine, self._deliver, self._metrics, self._fps = engine, deliver, metrics, fps
        self._wake, self._stop = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

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

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._step():
                    self._wake.wait(_IDLE_S)
                    self._wake.clear()
        except Exception as error:  # the replica's edge: whatever it was, the replica must say that it is not well
            self.error = error
            _LOG.exception("the engine's thread ended")

    def _step(self) -> bool:
        started_s = time.monotonic()
        results = self._engine.step()
        busy_s = time.monotonic() - started_s
        if results:
            self._report(results, busy_s)
        for result in results:
            self._deliver(result)
        return bool(results)

    def _report(self, results: Sequence[ChunkResult], busy_s: float) -> None:
        frames = sum(len(result.pixels) for result in results)
        self._metrics.inc("diagonal_generation_busy_seconds_total", busy_s)
        self._metrics.inc("diagonal_generated_media_seconds_total", frames / self._fps)
        if frames:
            self._metrics.set("diagonal_generation_frames_per_second", frames / busy_s)
