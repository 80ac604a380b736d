"""What a simulation is asked: how many replicas for so many viewers, what a lost node or a burst costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from diagonal.config import Config
from diagonal.errors import require
from diagonal.evaluate.simulation.arrivals import ArrivalProcess, Burst, Loss
from diagonal.evaluate.simulation.chunk_times import ChunkTimes
from diagonal.evaluate.simulation.figures import Second
from diagonal.evaluate.simulation.service import Fleet, Policies, SimulatedService

Figures = dict[str, Any]
_QUIET = 0.01  # waiting over watching beyond which a second counts as disturbed
_GROWTH = 1.25


@dataclass(frozen=True)
class Scenario:
    """Everything that a run depends on; `policies` makes new ones for each, for some remember."""

    config: Config
    times: ChunkTimes
    fleet: Fleet
    arrivals: ArrivalProcess
    policies: Callable[[], Policies]
    last_s: float = 180.0
    from_s: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.last_s > 0, "last_s", self.last_s, "seconds above 0")
        require(0 <= self.from_s < self.last_s, "from_s", self.from_s, f"seconds from 0 to below {self.last_s:g}")

    def run(self, losses: Sequence[Loss] = (), bursts: Sequence[Burst] = ()) -> Figures:
        """Its figures, with a line for each second, and how long it took this machine."""
        events: list[Loss | Burst] = [*losses, *bursts]
        for event in events:
            allowed = f"seconds from {self.from_s:g}, when counting begins, to below {self.last_s:g}"
            require(self.from_s <= event.at_s < self.last_s, "at_s", event.at_s, allowed)
        began_s = time.process_time()
        requests = self.arrivals.requests(self.last_s, self.seed, tuple(bursts))
        service = SimulatedService(
            self.config,
            self.times,
            self.fleet,
            self.arrivals,
            self.policies(),
            requests,
            self.seed,
            losses,
            self.from_s,
        )
        counters = service.run(self.last_s)
        about = {"replicas": self.fleet.replicas, "viewers": self.arrivals.viewers, "seed": self.seed}
        took = {"cpu_s": time.process_time() - began_s, "simulated_s": self.last_s}
        return {**about, **counters.figures(), **took, "seconds": counters.seconds()}

    def with_replicas(self, replicas: int) -> Scenario:
        return replace(self, fleet=replace(self.fleet, replicas=replicas))

    def with_viewers(self, viewers: int) -> Scenario:
        return replace(self, arrivals=replace(self.arrivals, viewers=viewers))


def fewest_replicas(scenario: Scenario, stall_rate: float, rejected_share: float, most: int = 10_000) -> Figures:
    """The fewest replicas with which waiting over watching stays below `stall_rate` and refusals below
    `rejected_share`; found from so many as have a slot for each, growing by a quarter, then halving what is left."""
    require(0 < stall_rate <= 1, "stall_rate", stall_rate, "a share above 0, at most 1")
    require(0 < rejected_share <= 1, "rejected_share", rejected_share, "a share above 0, at most 1")
    tried: dict[int, Figures] = {}

    def enough(replicas: int) -> bool:
        found = tried[replicas] = brief(scenario.with_replicas(replicas).run())
        return bool(found["stall_rate"] < stall_rate and found["rejected_share"] < rejected_share)

    low, high = 0, max(1, ceil(scenario.arrivals.viewers / scenario.config.serve.max_sessions))
    while not enough(high):
        low, high = high, max(high + 1, ceil(high * _GROWTH))
        require(high <= most, "viewers", scenario.arrivals.viewers, f"what {most} replicas can hold")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return {
        "viewers": scenario.arrivals.viewers,
        "replicas": high,
        "figures": tried[high],
        "tried": [tried[count] for count in sorted(tried)],
    }


def cost_of(scenario: Scenario, losses: Sequence[Loss] = (), bursts: Sequence[Burst] = ()) -> Figures:
    """What happens to the same viewers with and without it: the difference, and how long it can be noticed."""
    calm, struck = scenario.run(), scenario.run(losses, bursts)
    events: list[Loss | Burst] = [*losses, *bursts]
    at_s = min(event.at_s for event in events)
    return {
        "replicas": scenario.fleet.replicas,
        "viewers": scenario.arrivals.viewers,
        "at_s": at_s,
        "lost_replicas": sum(loss.replicas for loss in losses),
        "more_viewers": sum(one.viewers for one in bursts),
        "stall_s": struck["stall_s"] - calm["stall_s"],
        "moved": struck["moved"] - calm["moved"],
        "stalled_sessions": struck["stalled_sessions"] - calm["stalled_sessions"],
        "rejected": _outcome(struck, "rejected") - _outcome(calm, "rejected"),
        "lost": _outcome(struck, "lost") - _outcome(calm, "lost"),
        "recovered_after_s": recovered_after_s(calm["seconds"], struck["seconds"], at_s),
        "calm": brief(calm),
        "struck": brief(struck),
        "seconds": struck["seconds"],
    }


def recovered_after_s(calm: Sequence[Second], struck: Sequence[Second], at_s: float) -> float | None:
    """From `at_s` to the end of the last second with more waiting (a hundredth of watching) or more refusals than
    without it; None when that is the last one that was simulated."""
    last = at_s
    for second, (before, after) in enumerate(zip(calm, struck, strict=True)):
        waited = after["stall_s"] - before["stall_s"] > _QUIET * max(1.0, after["viewers"])
        if second + 1 > at_s and (waited or after["refused"] > before["refused"]):
            last = second + 1.0
    return None if last >= len(struck) - 1 else last - at_s


def brief(found: Figures) -> Figures:
    """Without the line for each second."""
    return {name: value for name, value in found.items() if name != "seconds"}


def _outcome(found: Figures, name: str) -> int:
    return int(found["outcomes"].get(name, 0))
