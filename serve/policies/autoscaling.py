"""How many replicas a release needs: by its sessions' slots and measured time, never fewer than they need to go on.

Policies are pickled by value: this file imports Ray and the standard library only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

SESSIONS, SLOTS, BUSY, REFUSED = "sessions", "slots", "busy", "refused"  # what replicas tell of themselves
_SLACK = 0.1  # beyond the spare share, of what must be free before a replica goes: so that two are not taken in turns
_REPORT_EVERY_S, _LOOK_BACK_S = 1.0, 5.0
_MOST_SPARE = 0.99
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Load:
    """What one replica says: sessions that hold one of its slots, the share of its time that they take (1: all that
    its budget allows), and how many it refused of late."""

    sessions: float
    slots: float
    busy: float
    refused: float = 0.0


def fewest(loads: Sequence[Load]) -> int:
    """So many replicas take all these sessions one by one, in whatever order they come.

    Of n replicas, those without a free slot hold `slots` sessions each, and those without time for one more session
    are busy by more than 1 - b, b being the heaviest one's share. Both cannot be all of them once n is as large.
    """
    sessions, slots, busy = _sums(loads)
    heaviest = max((load.busy / load.sessions for load in loads if load.sessions), default=0.0)
    if not sessions or not slots:
        return 0
    by_time = math.floor(busy / (1.0 - heaviest) + _ROUNDING) if heaviest < 1.0 else math.inf
    return int(min(sessions, _up(sessions / slots) + by_time))


def replicas_for(loads: Sequence[Load], target: int, least: int, most: int, headroom: float) -> int:
    """How many replicas there should be, `least` to `most`; `target` is how many there are to be by now.

    So many that `headroom` of slots and time stays free; one more than there are when sessions were refused though
    all of them run. Fewer only when a tenth more than that would still be free, and never fewer than the sessions
    need to be moved to them (`fewest`). While one has not told of its load yet, there are no fewer than before.
    """
    silent = target > len(loads)
    up = _spread(loads, headroom)
    if not silent and any(load.refused for load in loads):
        up = max(up, target + 1)
    down = max(_spread(loads, min(headroom + _SLACK, _MOST_SPARE)), fewest(loads))
    wanted = max(up, target if silent else min(target, down))
    return min(most, max(least, wanted))


def _spread(loads: Sequence[Load], headroom: float) -> int:
    """How many replicas hold these sessions with so much of slots and of time left."""
    sessions, slots, busy = _sums(loads)
    return _up(max(sessions / slots if slots else 0.0, busy) / (1.0 - headroom))


def _sums(loads: Sequence[Load]) -> tuple[float, float, float]:
    """All sessions, the slots of one replica, all busy shares."""
    slots = max((load.slots for load in loads), default=0.0)
    return sum(load.sessions for load in loads), slots, sum(load.busy for load in loads)


def _up(number: float) -> int:
    return math.ceil(number - _ROUNDING)


class SessionScaling:
    """The policy as Serve calls it; bounds and delays are Serve's own."""

    def __init__(self, headroom: float) -> None:
        self._headroom = headroom

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        loads = newest_loads(context.raw_metrics or {})
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return replicas_for(loads, context.target_num_replicas, least, most, self._headroom), {}


def newest_loads(metrics: dict[str, dict[Any, Any]]) -> list[Load]:
    """What each replica told last, of `record_autoscaling_stats`; of those that told it all."""
    told = [metrics.get(name, {}) for name in (SESSIONS, SLOTS, BUSY, REFUSED)]
    replicas = [replica for replica in told[0] if all(one.get(replica) for one in told)]
    return [Load(*(float(one[replica][-1].value) for one in told)) for replica in replicas]


def session_scaling(
    least: int, most: int, up_delay_s: float, down_delay_s: float, headroom: float
) -> AutoscalingConfig:
    """Of a release's replicas: `least` to `most`, by `replicas_for`."""
    policy = AutoscalingPolicy(policy_function=SessionScaling, policy_kwargs={"headroom": headroom})
    return _scaling(least, most, up_delay_s, down_delay_s, policy=policy)


def connection_scaling(
    least: int, most: int, up_delay_s: float, down_delay_s: float, connections: int
) -> AutoscalingConfig:
    """Of the gateways: `least` to `most`, so that each has about so many connections."""
    return _scaling(least, most, up_delay_s, down_delay_s, target_ongoing_requests=connections)


def _scaling(least: int, most: int, up_delay_s: float, down_delay_s: float, **by: Any) -> AutoscalingConfig:
    with warnings.catch_warnings():  # of the interval, which Serve would rather have as a variable of every process
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            upscale_delay_s=up_delay_s,
            downscale_delay_s=down_delay_s,
            metrics_interval_s=_REPORT_EVERY_S,
            look_back_period_s=_LOOK_BACK_S,
            **by,
        )
