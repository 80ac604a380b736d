"""A running service beside its simulation: chunk times are measured on it, then the same load goes to both.

Figures of the engine come from its metrics where `--metrics` says where Ray exports them, else from what clients see.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx2

from diagonal.config import Config
from diagonal.engine.budget import ChunkKind, first_stable_chunk
from diagonal.errors import require
from diagonal.evaluate.load.figures import Trace, summarise
from diagonal.evaluate.simulation.arrivals import ArrivalProcess, SessionRequest
from diagonal.evaluate.simulation.chunk_times import ChunkTimes, StepTime
from diagonal.evaluate.simulation.figures import Counters
from diagonal.evaluate.simulation.service import Fleet, SimulatedService
from jobs.benchmarks.load import OVERLOAD, arrivals, find_capacity, offer
from jobs.benchmarks.load_sessions import Plan
from jobs.benchmarks.service_policies import policies

ALLOWED = 0.15
_LAG_S = 12.0  # until Ray's metrics tell of what was
_CLIP_S, _LOAD_S, _OVERLOAD_S, _OVERLOAD_STAY_S = 10.0, 20.0, 20.0, 5.0
_FILLED = 0.75  # of what is admitted at once, in the load
_APART_CHUNKS = 2.5  # between two watched streams: when one has a chunk made, the other is in the middle of one
_USUAL_ENCODE_S = 0.02
Row = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What a service had done by then: seconds its engines were busy, pixel frames, seconds and chunks of encoding."""

    at_s: float
    busy_s: float
    frames: float
    encode_s: float
    encoded: float

    @classmethod
    def of(cls, text: str, at_s: float) -> Reading:
        """From Ray's metrics page: sums over all replicas."""
        names = (
            "generation_busy_seconds_total",
            "frames_generated_total",
            "chunk_encode_seconds_sum",
            "chunk_encode_seconds_count",
        )
        return cls(at_s, *(total(text, f"diagonal_{name}") for name in names))

    def since(self, before: Reading) -> Reading:
        return Reading(
            self.at_s - before.at_s,
            self.busy_s - before.busy_s,
            self.frames - before.frames,
            self.encode_s - before.encode_s,
            self.encoded - before.encoded,
        )


def total(text: str, name: str) -> float:
    """The sum of a metric's samples, whatever their labels; 0 where there are none."""
    sample = re.compile(rf"^(?:ray_)?{name}(?:\{{[^}}]*\}})? (\S+)", re.MULTILINE)
    return sum(float(value) for value in sample.findall(text))


def check(url: str, metrics: str | None, config: Config, replicas: int, gateways: int) -> Row:
    """Measure, load, simulate, compare; `within` when all that was measured differs by `ALLOWED` at most."""
    require(replicas >= 1, "--replicas", replicas, "a whole number of at least 1")
    plan = Plan(url, _CLIP_S, change_every=0)
    read = Metrics(metrics)
    times = measure(plan, read, config)
    capacity, calm = asyncio.run(find_capacity(plan))
    require(capacity > 0, "--check", url, "a service that admits at least one session")
    simulated = Simulated(config, times, Fleet(replicas, gateways))
    rows = [row("sessions admitted at once", capacity, simulated.capacity(2 * replicas * config.serve.max_sessions))]
    rows += compare_load(replace(plan, seconds=_LOAD_S), read, simulated, max(1, int(_FILLED * capacity)), replicas)
    rows += compare_overload(replace(plan, seconds=_OVERLOAD_STAY_S), simulated, capacity)
    judged = [abs(one["difference"]) <= ALLOWED for one in rows if one["difference"] is not None]
    return {"kind": "check", "rows": rows, "within": all(judged), "allowed": ALLOWED, "times": asdict(times)}


class Metrics:
    """The service's counters, when they have caught up; none without an address."""

    def __init__(self, url: str | None) -> None:
        self._url = url

    def __call__(self) -> Reading | None:
        if self._url is None:
            return None
        time.sleep(_LAG_S)
        answer = httpx2.get(self._url, timeout=30.0)
        answer.raise_for_status()
        found = Reading.of(answer.text, time.monotonic())
        require("diagonal_" in answer.text, "--metrics", self._url, "an address that exports the service's metrics")
        return found


def measure(plan: Plan, read: Metrics, config: Config) -> ChunkTimes:
    """What a step of one, of two and of most sessions takes.

    That of one by two watched streams whose chunks never fall together: beside a stream that nobody paces its encoder
    never rests, which would slow each step where both share the cores. Those of more by so many unpaced clips.
    """
    geometry = config.geometry
    chunk_frames, seconds, encode_s = geometry.chunk_pixel_frames(1), dict[int, float](), _USUAL_ENCODE_S
    unpaced, apart = replace(plan, pacing="none"), [0.0, _APART_CHUNKS * geometry.chunk_media_s(1)]
    asyncio.run(offer(unpaced, [0.0], "ws"))  # connections are made, and clocks come up
    before = read()
    for size in sorted({1, min(2, config.serve.batch_sessions), config.serve.batch_sessions}):
        began_s = time.monotonic()
        load = (plan, apart) if size == 1 and before else (unpaced, [0.0] * size)  # a wall clock tells of no share
        traces = asyncio.run(offer(*load, "ws"))
        frames = sum(trace.frames for trace in traces)
        spent_s, after = time.monotonic() - began_s, read()
        if before is not None and after is not None:
            done = after.since(before)
            frames, spent_s = round(done.frames), done.busy_s
            if size == 1 and done.encoded:  # with more of them it also counts how they wait for each other
                encode_s = done.encode_s / done.encoded
        require(frames > 0, "--check", plan.url, "a service that makes clips when nobody else asks")
        seconds[size], before = size * spent_s * chunk_frames / frames, after
    return ChunkTimes(
        "the running service", plan.url, tuple(steps(config, seconds)), seconds[1] / 4, seconds[1], encode_s
    )


def steps(config: Config, seconds: Mapping[int, float]) -> list[StepTime]:
    """All kinds of a chunk at the mean of a clip: its first chunks are few, and their decoding costs as much."""
    window_chunks = config.cache.window_frames // config.geometry.chunk_frames
    chunks = range(first_stable_chunk(config.schedule, window_chunks) + 1)
    kinds = [ChunkKind.of(config.schedule, chunk, window_chunks) for chunk in chunks]
    return [
        StepTime(kind.forwards, kind.context_chunks, size, took_s)
        for kind in dict.fromkeys(kinds)
        for size, took_s in seconds.items()
    ]


@dataclass(frozen=True)
class Simulated:
    """The service that the check looks at, simulated."""

    config: Config
    times: ChunkTimes
    fleet: Fleet

    def run(self, requests: Sequence[SessionRequest], last_s: float) -> Counters:
        crowd = ArrivalProcess(0, network_s=0.0)
        return SimulatedService(self.config, self.times, self.fleet, crowd, policies(), requests).run(last_s)

    def capacity(self, most: int) -> int:
        """How many come one after the other, each when the one before has its first chunk, until one is refused."""
        for count in range(1, most + 1):
            gap_s = 2 * self.times.steps[0].seconds + self.times.encode_s + self.times.deliver_s
            requests = [SessionRequest(number * gap_s, 1e6) for number in range(count)]
            if self.run(requests, count * gap_s + 1.0).outcomes["rejected"]:
                return count - 1
        return most


def compare_load(plan: Plan, read: Metrics, simulated: Simulated, sessions: int, replicas: int) -> list[Row]:
    """Streams that are admitted: how often a chunk comes, and how busy that keeps the engines."""
    at_s = arrivals(4.0, seed=1, count=sessions)
    before, began_s = read(), time.monotonic()
    figures = summarise(asyncio.run(offer(plan, at_s, "ws")))
    lasted_s, after = time.monotonic() - began_s, read()
    busy = None
    if before is not None and after is not None:
        busy = after.since(before).busy_s / (lasted_s * replicas)
    counters = simulated.run([SessionRequest(one_s, plan.seconds, asked=True) for one_s in at_s], lasted_s)
    found = counters.figures()
    interval = figures["chunk_interval_s"]["p50"], found["chunk_interval_s"]["p50"]
    title, share = f"{sessions} sessions", counters.busy_s / (lasted_s * replicas)
    return [
        row(f"{title}: between chunks, p50, s", *interval),
        row(f"{title}: share of its time that an engine is busy", busy, share),
        row(f"{title}: waiting in all, s", figures["stall_s"], found["stall_s"], judged=False),
    ]


def compare_overload(plan: Plan, simulated: Simulated, capacity: int) -> list[Row]:
    """Ten times as many as are admitted: how many are refused."""
    at_s = arrivals(OVERLOAD * capacity / plan.seconds, seed=2, last_s=_OVERLOAD_S)
    traces: list[Trace] = asyncio.run(offer(plan, at_s, "ws"))
    real = sum(trace.outcome == "rejected" for trace in traces) / len(traces)
    counters = simulated.run(
        [SessionRequest(one_s, plan.seconds, asked=True) for one_s in at_s], at_s[-1] + 3 * plan.seconds
    )
    found = counters.figures()
    admitted = sum(trace.outcome == "completed" for trace in traces), counters.outcomes["completed"]
    interval = summarise(traces)["chunk_interval_s"]["p50"], found["chunk_interval_s"]["p50"]
    return [
        row("overloaded: share refused", real, found["rejected_share"]),
        row(f"overloaded: completed of {len(traces)}", *admitted, judged=False),
        row("overloaded: between chunks, p50, s", *interval, judged=False),
    ]


def row(what: str, real: float | None, simulated: float | None, judged: bool = True) -> Row:
    """Both values and, where it counts, how much the simulated one is off."""
    known = judged and real and simulated is not None
    difference = simulated / real - 1.0 if known and real and simulated is not None else None
    return {"what": what, "real": real, "simulated": simulated, "difference": difference}
