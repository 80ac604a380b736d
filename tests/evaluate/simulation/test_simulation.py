"""A simulated replica makes chunks when the engine over networks would; what a simulation is asked and given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import pytest

from diagonal.config import Config
from diagonal.engine.budget import CapacityError, ChunkKind
from diagonal.engine.engine import Engine
from diagonal.engine.specs import PromptChange
from diagonal.errors import FieldError
from diagonal.evaluate.simulation.arrivals import ArrivalProcess, Burst, Loss
from diagonal.evaluate.simulation.chunk_times import ChunkTimes, Draws, StepTime
from diagonal.evaluate.simulation.clock import Calendar
from diagonal.evaluate.simulation.maker import simulated_config
from diagonal.evaluate.simulation.replica import SimulatedReplica
from diagonal.evaluate.simulation.service import Fleet
from diagonal.evaluate.simulation.sizing import recovered_after_s
from diagonal.schedule import StepSchedule
from tests.engine.driving import spec_of
from tests.networks import small_release

FORWARD_S, ROW_S = 0.05, 0.02  # of a forward, and of each row in it
SLOWER = 1.3  # once it is warm: what admission and scheduler know of it is no longer right, and is measured anew
SLOTS, BATCH, CHANGE_AT = 12, 3, 5
LEAD_S, CHUNKS, BETWEEN_S, LAST_S = 1.0, 10, 0.4, 20.0
SETTINGS = (f"serve.max_sessions={SLOTS}", f"serve.batch_sessions={BATCH}")


def measured(schedule: StepSchedule, window: int, batch: int, factor: float) -> ChunkTimes:
    """What `timed` makes of each step: every forward takes its time and that of its rows."""
    kinds = {ChunkKind.of(schedule, chunk, window) for chunk in range(window + len(schedule.rows))}
    steps = [
        StepTime(kind.forwards, kind.context_chunks, size, factor * kind.forwards * (FORWARD_S + ROW_S * size))
        for kind in kinds
        for size in range(1, batch + 1)
    ]
    return ChunkTimes("by hand", "known", tuple(steps), recache_chunk_s=factor * (FORWARD_S + ROW_S))


@dataclass
class Seen:
    """What came of a run: who was admitted, when each chunk was there, and how long the engine was busy."""

    admitted: list[bool] = field(default_factory=list)
    at_s: dict[str, list[float]] = field(default_factory=dict)
    busy_s: float = 0.0


class Viewers:
    """They come one by one, ask for a chunk when less than the lead is ahead, change their prompt once, and leave."""

    def __init__(self, engine: Engine, calendar: Calendar, request: Callable[[str], None]) -> None:
        self._engine, self._calendar, self._request = engine, calendar, request
        self._began_s: dict[str, float] = {}
        self.seen = Seen()
        for number in range(SLOTS):
            calendar.at(BETWEEN_S * number, self._come, f"s{number:02}")

    def _come(self, name: str) -> None:
        try:
            self._engine.open(spec_of(name, frames=None))
        except CapacityError:
            self.seen.admitted.append(False)
            return
        self.seen.admitted.append(True)
        self._began_s[name] = self._calendar.now_s
        self._request(name)

    def receive(self, name: str) -> None:
        times = self.seen.at_s.setdefault(name, [])
        times.append(self._calendar.now_s)
        if len(times) == CHUNKS:
            return self._engine.close(name)
        media_s = self._engine.geometry.pixel_start(len(times)) / self._engine.geometry.pixel_fps
        self._calendar.at(self._began_s[name] + media_s - LEAD_S, self._ask, name, len(times))

    def _ask(self, name: str, chunk: int) -> None:
        if chunk == CHANGE_AT:
            self._engine.interact(name, PromptChange(f"{name}-change", "another"))
        self._request(name)


def with_networks() -> tuple[Seen, Config]:
    """The engine over networks on a clock that its forwards move; others ask meanwhile, as other threads would."""
    calendar, release, factor = Calendar(), small_release(*SETTINGS), [1.0]

    def pass_time(module: Any, inputs: Any, output: Any) -> None:
        calendar.run(calendar.now_s + factor[0] * (FORWARD_S + ROW_S * len(inputs[0])))

    release.network.register_forward_hook(pass_time)
    engine = Engine(release, clock=calendar)
    engine.warm_up()
    calendar.now_s, factor[0] = 0.0, SLOWER
    stepping = [False]

    def request(name: str) -> None:
        engine.request(name)
        if not stepping[0]:
            stepping[0] = True
            calendar.at(calendar.now_s, step)

    def step() -> None:
        began_s = calendar.now_s
        while results := engine.step():
            viewers.seen.busy_s += calendar.now_s - began_s
            for result in results:
                viewers.receive(result.session_id)
            began_s = calendar.now_s
        stepping[0] = False

    viewers = Viewers(engine, calendar, request)
    calendar.run(LAST_S)
    return viewers.seen, release.config


def with_measured_times(config: Config) -> Seen:
    """The same viewers at a simulated replica."""
    calendar, window = Calendar(), config.cache.window_frames // config.geometry.chunk_frames
    warm, slower = (measured(config.schedule, window, BATCH, factor) for factor in (1.0, SLOWER))
    draws = Draws(warm, 0)
    replica = SimulatedReplica(
        "r", simulated_config(config), draws, calendar, lambda r, _: viewers.receive(r.session_id)
    )
    draws.change(slower)
    viewers = Viewers(replica.engine, calendar, replica.request)
    calendar.run(LAST_S)
    viewers.seen.busy_s = replica.take_busy_s()
    return viewers.seen


@pytest.mark.slow
def test_an_engine_over_measured_times_does_what_it_does_over_networks_that_take_them() -> None:
    """Admission, batches, slack, re-caches and the measured costs that they feed: every chunk at the same time."""
    real, config = with_networks()
    simulated = with_measured_times(config)
    assert 2 < sum(real.admitted) < SLOTS, "the budget, not the slots, says who is admitted"
    assert simulated.admitted == real.admitted
    assert simulated.at_s.keys() == real.at_s.keys()
    for name, times in real.at_s.items():
        assert simulated.at_s[name] == pytest.approx(times, abs=1e-6), name
    assert simulated.busy_s == pytest.approx(real.busy_s, abs=1e-6)


def test_times_come_from_a_bench_and_between_its_sizes() -> None:
    times = ChunkTimes.read("docs/results/speed-cpu.json")
    settled = ChunkKind(2, 3)
    one, two, four, eight = (times.step_s(settled, size) for size in (1, 2, 4, 8))
    found = json.loads(Path("docs/results/speed-cpu.json").read_text())
    assert one == found["rates"]["decoded"]["p50_ms"] / 1000
    assert four / one == pytest.approx(4 / found["batching"]["ratio"])
    assert one < two < four and two == pytest.approx(one + (four - one) / 3) and eight == pytest.approx(2 * four)
    assert times.step_s(ChunkKind(3, 1), 1) == pytest.approx((one + found["rates"]["decoded"]["first_chunk_s"]) / 2)


def test_draws_scatter_about_the_median_as_was_measured_and_alike_for_one_seed() -> None:
    times = ChunkTimes("d", "s", (StepTime(2, 3, 1, 0.1),), p95_ratio=1.5)
    first, again = Draws(times, 1), Draws(times, 1)
    drawn = sorted(first.step_s(ChunkKind(2, 3), 1) for _ in range(4000))
    assert drawn == sorted(again.step_s(ChunkKind(2, 3), 1) for _ in range(4000))
    assert drawn[2000] == pytest.approx(0.1, rel=0.03) and drawn[3800] == pytest.approx(0.15, rel=0.05)


@pytest.mark.parametrize(
    ("field_name", "make"),
    [
        ("steps.seconds", lambda: StepTime(2, 3, 1, 0.0)),
        ("steps.batch", lambda: StepTime(2, 3, 0, 0.1)),
        ("steps.batch", lambda: ChunkTimes("d", "s", (StepTime(2, 3, 4, 0.1),))),
        ("p95_ratio", lambda: ChunkTimes("d", "s", (StepTime(2, 3, 1, 0.1),), p95_ratio=0.5)),
        ("hop_s", lambda: ChunkTimes("d", "s", (StepTime(2, 3, 1, 0.1),), hop_s=-1.0)),
        ("viewers", lambda: ArrivalProcess(-1)),
        ("spread", lambda: ArrivalProcess(1, spread="even")),  # type: ignore[arg-type]
        ("stay_s", lambda: ArrivalProcess(1, stay_s=0.0)),
        ("network_s", lambda: ArrivalProcess(1, network_s=inf)),
        ("replicas", lambda: Fleet(0)),
        ("loss.replicas", lambda: Loss(1.0, 0)),
        ("burst.last_s", lambda: Burst(1, 1, 0)),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(field_name: str, make: Callable[[], object]) -> None:
    with pytest.raises(FieldError) as caught:
        make()
    assert caught.value.field == field_name and caught.value.allowed


def test_a_bench_without_rates_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({"rates": {}}))
    with pytest.raises(FieldError, match="a bench's JSON with rates, batching and config"):
        ChunkTimes.read(tmp_path / "bench.json")


def test_arrivals_come_at_the_rate_that_keeps_so_many_there() -> None:
    requests = ArrivalProcess(50, stay_s=20.0, spread="lognormal").requests(4000.0, seed=3)
    assert len(requests) == pytest.approx(50 + 50 / 20 * 4000, rel=0.05)
    assert sum(request.stay_s for request in requests) / 4000 == pytest.approx(50, rel=0.05)
    assert requests == ArrivalProcess(50, stay_s=20.0, spread="lognormal").requests(4000.0, seed=3)


def test_recovery_is_the_end_of_the_last_second_that_is_worse() -> None:
    calm = [{"viewers": 10.0, "stall_s": 0.0, "refused": 0.0} for _ in range(10)]
    struck = [dict(second) for second in calm]
    struck[4]["stall_s"], struck[6]["refused"] = 3.0, 1.0
    assert recovered_after_s(calm, struck, 3.0) == 4.0
    assert recovered_after_s(calm, calm, 3.0) == 0.0
    struck[9]["refused"] = 2.0
    assert recovered_after_s(calm, struck, 3.0) is None
