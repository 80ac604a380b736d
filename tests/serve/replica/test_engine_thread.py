"""The thread that drives the engine: when it says that the engine is well, and how it finds out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from diagonal.engine.engine import Health
from serve.replica.engine_thread import EngineThread
from tests.serve.harness import FakeEngine, Until


class Watch:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


class HardToDrive(FakeEngine):
    """Hangs in a step while `hang` is set, and fails its exercise while `broken` is."""

    def __init__(self) -> None:
        super().__init__()
        self.hang, self.hanging, self.broken, self.failures, self.exercises = threading.Event(), False, False, 0, 0
        self.during: Callable[[], Any] = lambda: None

    def step(self) -> Any:
        if self.hang.is_set():
            self.hanging = True
            while self.hang.is_set():
                threading.Event().wait(0.005)
            self.hanging = False
        return super().step()

    def health(self) -> Health:
        return Health(self.failures < 3, self.failures)

    def exercise(self) -> bool:
        self.during()
        self.exercises += 1
        self.failures = self.failures + 1 if self.broken else 0
        return not self.broken


@pytest.fixture
def engine() -> HardToDrive:
    return HardToDrive()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def thread(engine: HardToDrive, watch: Watch) -> Iterator[EngineThread]:
    made = EngineThread(engine, lambda result: None, 0.75, watch)
    made.start()
    yield made
    engine.hang.clear()
    made.stop()


def test_an_engine_that_hangs_is_unhealthy_until_it_continues(
    engine: HardToDrive, watch: Watch, thread: EngineThread, until: Until
) -> None:
    assert thread.healthy and thread.deadline_s == 2.25
    engine.hang.set()
    thread.wake()
    until(lambda: engine.hanging, "the engine hangs")
    watch.s += 2.25
    assert thread.healthy
    watch.s += 0.01
    assert not thread.healthy and thread.late and thread.alive and not thread.lost
    for _ in range(24):
        pass_time(watch, thread, 1.0)
    assert not thread.lost, "it may still come: ten times as long is late"
    for _ in range(5):
        pass_time(watch, thread, 1.0)
    assert thread.lost
    engine.hang.clear()
    until(lambda: thread.healthy, "it goes on")
    assert not thread.lost


def pass_time(watch: Watch, thread: EngineThread, seconds: float) -> float:
    watch.s += seconds
    return thread.tick()


def test_a_process_that_stood_still_is_late_and_does_not_hang(
    engine: HardToDrive, watch: Watch, thread: EngineThread, until: Until
) -> None:
    engine.hang.set()
    thread.wake()
    until(lambda: engine.hanging, "the engine hangs")
    thread.tick()
    assert pass_time(watch, thread, 1.0) == 0.0
    assert pass_time(watch, thread, 60.0) == 58.75, "so much of it was late"
    assert thread.late and not thread.lost
    engine.hang.clear()
    until(lambda: thread.healthy, "it goes on")
    assert pass_time(watch, thread, 1.0) == 0.0


def test_a_slow_engine_has_three_of_its_own_steps(watch: Watch) -> None:
    thread = EngineThread(HardToDrive(), lambda result: None, 0.75, watch)
    thread._step_s = 2.0
    assert thread.deadline_s == 6.0


def test_an_idle_engine_is_not_late(watch: Watch, thread: EngineThread) -> None:
    watch.s += 3600
    assert thread.healthy


def test_an_engine_asked_to_prove_itself_makes_a_chunk_for_nobody(
    engine: HardToDrive, watch: Watch, thread: EngineThread, until: Until
) -> None:
    watch.s += 10
    assert not thread.proved_within(5.0)
    thread.ask_exercise()
    until(lambda: thread.proved_within(5.0), "proved")
    assert engine.exercises == 1
    engine.broken = True
    watch.s += 10
    thread.ask_exercise()
    until(lambda: engine.exercises >= 2, "exercised")
    assert not thread.proved_within(5.0)


def test_after_failures_in_a_row_the_engine_must_show_that_it_still_can(
    engine: HardToDrive, thread: EngineThread, until: Until
) -> None:
    engine.failures = 3
    thread.wake()
    until(lambda: engine.exercises == 1 and thread.healthy, "it could")
    engine.broken, engine.failures = True, 3
    thread.wake()
    until(lambda: engine.exercises >= 3, "tried again and again")
    assert not thread.healthy and thread.alive


def test_an_engine_is_healthy_until_it_has_failed_its_own_exercise(
    engine: HardToDrive, thread: EngineThread, until: Until
) -> None:
    """Else three bad prompts would keep a good one out, and have the replica replaced."""
    seen = []
    engine.during = lambda: seen.append((thread.healthy, thread.lost))
    engine.failures = 3
    thread.wake()
    until(lambda: engine.exercises == 1, "it tried")
    assert seen == [(True, False)]


def test_a_thread_that_ended_is_not_well(engine: HardToDrive, until: Until) -> None:
    thread = EngineThread(engine, lambda result: None)
    assert not thread.healthy, "nor one that has not begun"
    thread.start()
    thread.stop()
    assert not thread.alive and not thread.healthy
