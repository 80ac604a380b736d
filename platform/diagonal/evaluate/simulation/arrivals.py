"""Who comes to a simulated service and when: arrivals at random, how long they stay, and what goes wrong meanwhile."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from math import inf
from typing import Literal

from diagonal.errors import require

Spread = Literal["fixed", "exponential", "lognormal"]
SPREADS: tuple[Spread, ...] = ("fixed", "exponential", "lognormal")
_LOGNORMAL_SIGMA = 1.0  # half of all stay less than 0.6 of the mean, one of ten twice as long


@dataclass(frozen=True)
class SessionRequest:
    """Somebody comes at `at_s` and stays so long; with `asked` he asks for a video of that length and sees its end.
    He leaves when he must wait longer than `patience_s` at once."""

    at_s: float
    stay_s: float
    asked: bool = False
    patience_s: float = inf


@dataclass(frozen=True)
class ArrivalProcess:
    """`viewers` watch at once, on average: they come as a Poisson process and stay `stay_s` (mean) by `spread`.

    The first of them come within `ramp_s`. `patience_s` is the mean of an exponential distribution, infinite for
    viewers who wait for ever. A prompt changes every `change_every` chunks (0: never).
    A refused viewer tries again `retries` times, when he was told to.
    """

    viewers: int
    stay_s: float = 120.0
    spread: Spread = "exponential"
    ramp_s: float = 30.0
    patience_s: float = inf
    change_every: int = 0
    transition_chunks: int = 0
    retries: int = 0
    start_buffer_s: float = 0.9
    network_s: float = 0.02
    asked: bool = False

    def __post_init__(self) -> None:
        for name in ("viewers", "change_every", "transition_chunks", "retries"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a whole number of at least 0")
        require(self.spread in SPREADS, "spread", self.spread, f"one of {list(SPREADS)}")
        for name in ("stay_s", "ramp_s", "patience_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "seconds above 0")
        for name in ("start_buffer_s", "network_s"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "seconds of at least 0")
        for name in ("stay_s", "ramp_s", "start_buffer_s", "network_s"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number of seconds")

    def requests(self, last_s: float, seed: int, bursts: tuple[Burst, ...] = ()) -> list[SessionRequest]:
        """Everybody who comes before `last_s`, in order of time; the same for one seed, with and without bursts."""
        draw = random.Random(seed)
        first = [self._request(draw.uniform(0.0, self.ramp_s), draw) for _ in range(self.viewers)]
        all_requests, at_s, rate = first, 0.0, self.viewers / self.stay_s
        while rate and (at_s := at_s + draw.expovariate(rate)) < last_s:
            all_requests.append(self._request(at_s, draw))
        apart = random.Random(seed + 1)
        for burst in bursts:
            all_requests += [
                self._request(burst.at_s + apart.uniform(0.0, burst.last_s), apart) for _ in range(burst.viewers)
            ]
        return sorted(all_requests, key=lambda request: request.at_s)

    def _request(self, at_s: float, draw: random.Random) -> SessionRequest:
        stay_s = self.stay_s
        if self.spread == "exponential":
            stay_s = draw.expovariate(1.0 / self.stay_s)
        elif self.spread == "lognormal":
            stay_s = draw.lognormvariate(math.log(self.stay_s) - _LOGNORMAL_SIGMA**2 / 2, _LOGNORMAL_SIGMA)
        patience_s = draw.expovariate(1.0 / self.patience_s) if math.isfinite(self.patience_s) else inf
        return SessionRequest(at_s, stay_s, self.asked, patience_s)


@dataclass(frozen=True)
class Burst:
    """So many more viewers come, spread over `last_s` from `at_s` on."""

    at_s: float
    viewers: int
    last_s: float = 10.0

    def __post_init__(self) -> None:
        require(self.at_s >= 0, "burst.at_s", self.at_s, "seconds of at least 0")
        require(self.viewers >= 1, "burst.viewers", self.viewers, "a whole number of at least 1")
        require(0 < self.last_s < inf, "burst.last_s", self.last_s, "seconds above 0")


@dataclass(frozen=True)
class Loss:
    """So many replicas are gone at once, as with their node; others take their place `start_s` of a replica later."""

    at_s: float
    replicas: int

    def __post_init__(self) -> None:
        require(self.at_s >= 0, "loss.at_s", self.at_s, "seconds of at least 0")
        require(self.replicas >= 1, "loss.replicas", self.replicas, "a whole number of at least 1")
