"""The service's own decisions for a simulated one: its router's order, its pacing, its refusals, its autoscaling.

The only file of jobs/ that looks into serve/, so that what is simulated is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.serve import autoscaling_policy

from diagonal.evaluate.simulation.service import Clock, Policies, ReplicaLoad
from serve.gateway.failover import FULL_PATIENCE_S, PATIENCE_S, WAIT_S
from serve.policies.autoscaling import Load, replicas_for, session_scaling
from serve.policies.driving import LOOK_AT_REPLICA_S
from serve.policies.load_shedding import RecentRefusals
from serve.policies.pacing import PlaybackClock
from serve.policies.routing import Ranking
from serve.records import Pacing, Refused, VideoRecord

_VIDEO = VideoRecord("", "", "", 0, 0, 1, 1, "", Pacing.REALTIME, 0.0)


class Repeated:
    """`RecentRefusals` of requests that are all alike."""

    def __init__(self, now: Clock) -> None:
        self._recent = RecentRefusals(now)

    def note(self, retry_after_s: float) -> None:
        self._recent.note(_VIDEO, Refused("server_full", "", retry_after_s=retry_after_s))

    def repeated_s(self) -> float | None:
        found = self._recent.cached_refusal(_VIDEO)
        self._recent.clear_probe(_VIDEO)  # a question takes no time here
        return None if found is None else found.retry_after_s


class Scaling:
    """`serve.policies.autoscaling.replicas_for`, and Serve's own delays before it does what that says."""

    def __init__(self, least: int, most: int, up_delay_s: float, down_delay_s: float, headroom: float) -> None:
        self._least, self._most, self._headroom = least, most, headroom
        self._config = session_scaling(least, most, up_delay_s, down_delay_s, headroom)
        self._state: dict[str, Any] = {}

    def __call__(self, loads: Sequence[ReplicaLoad], target: int, now_s: float) -> int:
        wanted = replicas_for([Load(*one) for one in loads], target, self._least, self._most, self._headroom)
        decided, self._state = autoscaling_policy._apply_delay_logic(wanted, target, self._config, self._state, now_s)
        return int(decided)


def policies(scaling: Callable[[], Scaling] | None = None) -> Policies:
    """New ones, which remember nothing; without `scaling` there are as many replicas as at first."""
    return Policies(
        Ranking,
        PlaybackClock,
        Repeated,
        scaling() if scaling else None,
        LOOK_AT_REPLICA_S,
        WAIT_S,
        PATIENCE_S,
        FULL_PATIENCE_S,
    )
