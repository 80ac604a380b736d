"""What came of a simulation: counts, percentiles, and a line for each second."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from diagonal.evaluate.load.figures import percentiles

Second = dict[str, float]


@dataclass
class Counters:
    """What is counted from `from_s` on; before that the service only fills."""

    from_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    first_frame_s: array[float] = field(default_factory=lambda: array("d"))
    interval_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_s: array[float] = field(default_factory=lambda: array("d"))
    moved: int = 0
    stalls: int = 0
    stall_s: float = 0.0
    stalled: set[int] = field(default_factory=set)
    watched_s: float = 0.0
    media_s: float = 0.0
    busy_s: float = 0.0
    replica_s: float = 0.0
    peak: int = 0
    viewers: list[int] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    _stalled_by_second: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    _refused_by_second: Counter[int] = field(default_factory=Counter)

    def second(self, viewers: int, replicas: int) -> None:
        """So many are there as a second begins."""
        self.peak = max(self.peak, viewers)
        self.viewers.append(viewers)
        self.replicas.append(replicas)

    def stall(self, number: int, at_s: float, waited_s: float) -> None:
        """Viewer `number` waited so long until then."""
        self._stalled_by_second[int(at_s)] += waited_s
        if at_s >= self.from_s:
            self.stalls, self.stall_s = self.stalls + 1, self.stall_s + waited_s
            self.stalled.add(number)

    def refuse(self, came_s: float, at_s: float, why: str) -> None:
        """Somebody who came at `came_s` was refused."""
        self._refused_by_second[int(at_s)] += 1
        if came_s >= self.from_s:
            self.refusals[why] += 1

    def seconds(self) -> list[Second]:
        """Of each second: who watched, with how many replicas, how long they waited in all, how many were refused."""
        return [
            {
                "viewers": viewers,
                "replicas": replicas,
                "stall_s": self._stalled_by_second.get(second, 0.0),
                "refused": self._refused_by_second[second],
            }
            for second, (viewers, replicas) in enumerate(zip(self.viewers, self.replicas, strict=True))
        ]

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON holds it. `stall_rate` is waiting over watching; `busy_share` over all replicas' time."""
        arrived = sum(self.outcomes.values())
        admitted = arrived - self.outcomes["rejected"]
        return {
            "sessions": arrived,
            "outcomes": dict(sorted(self.outcomes.items())),
            "refusals": dict(sorted(self.refusals.items())),
            "moved": self.moved,
            "peak_viewers": self.peak,
            "rejected_share": self.outcomes["rejected"] / arrived if arrived else 0.0,
            "stalls": self.stalls,
            "stall_s": self.stall_s,
            "stalled_sessions": len(self.stalled),
            "stall_rate": self.stall_s / self.watched_s if self.watched_s else 0.0,
            "stalled_share": len(self.stalled) / admitted if admitted else 0.0,
            "watched_s": self.watched_s,
            "media_s": self.media_s,
            "busy_share": self.busy_s / self.replica_s if self.replica_s else 0.0,
            "first_frame_s": percentiles(self.first_frame_s),
            "chunk_interval_s": percentiles(self.interval_s),
            "prompt_s": percentiles(self.prompt_s),
        }
