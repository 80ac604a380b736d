"""What a job and its workers say to each other while a stage runs: stop, and failures that no restart can mend."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

ASK_EVERY_S = 0.5


@dataclass(frozen=True)
class Failure:
    """An error that ends the stage, on which rank, with its traceback's text."""

    error: Exception
    rank: int
    traceback: str


class Control:
    """The state of one stage's conversation; `start_control` makes it an actor."""

    def __init__(self) -> None:
        self._stops = False
        self._failure: Failure | None = None

    def stop(self) -> None:
        self._stops = True

    def stops(self) -> bool:
        return self._stops

    def fail(self, failure: Failure) -> None:
        """The first one counts: others follow from it."""
        self._failure = self._failure or failure

    def failure(self) -> Failure | None:
        return self._failure


def start_control() -> Any:
    """A `Control` that workers on all nodes reach; it takes no resources and ends with the job."""
    return ray.remote(num_cpus=0, max_restarts=-1)(Control).remote()


@dataclass
class StopRequests:
    """Asks now and then, without waiting, whether the stage should stop."""

    control: Any
    _answer: Any = None
    _asked_s: float = field(default=float("-inf"))
    _stops: bool = False

    def __call__(self) -> bool:
        now_s = time.monotonic()
        if self.control is None or self._stops or now_s - self._asked_s < ASK_EVERY_S:
            return self._stops
        self._asked_s = now_s
        if self._answer is None:
            self._answer = self.control.stops.remote()
        elif ray.wait([self._answer], timeout=0)[0]:
            try:
                self._stops = bool(ray.get(self._answer))
            except RayError:  # the actor is restarting, or its node is lost: nobody has asked
                self._stops = False
            self._answer = None
        return self._stops
