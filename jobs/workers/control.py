"""What a job and its workers say to each other while a stage runs: stop, and failures that no restart can mend."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.runs.console import Position


@dataclass(frozen=True)
class Failure:
    """An error that ends the stage, on which rank, with its traceback's text."""

    error: Exception
    rank: int
    traceback: str


class StageController:
    """The state of one stage's conversation; `start_controller` makes it an actor."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._failure: Failure | None = None
        self._position: Position | None = None

    async def stop(self) -> None:
        self._stop.set()

    async def stopped(self) -> None:
        """Answers once `stop` was called."""
        await self._stop.wait()

    async def fail(self, failure: Failure) -> None:
        """The first one counts: others follow from it."""
        self._failure = self._failure or failure

    async def failure(self) -> Failure | None:
        return self._failure

    async def show(self, position: Position) -> None:
        self._position = position

    async def position(self) -> Position | None:
        """How far the stage has come; None before its first update."""
        return self._position


def start_controller() -> Any:
    """A `StageController` that workers on all nodes reach; it takes no resources and ends with the job."""
    return ray.remote(num_cpus=0, max_restarts=-1)(StageController).remote()


@dataclass
class StopRequests:
    """Whether the stage should stop, known without waiting: one question stays open until its answer comes.

    So a request counts after the update that runs when it is made, however long updates are.
    """

    control: Any
    _answer: Any = None
    _stops: bool = False

    def __call__(self) -> bool:
        if self.control is None or self._stops:
            return self._stops
        self._answer = self._answer or self.control.stopped.remote()
        if ray.wait([self._answer], timeout=0)[0]:
            try:
                ray.get(self._answer)
                self._stops = True
            except RayError:  # the actor is restarting, or its node is lost: it is asked anew
                self._answer = None
        return self._stops
