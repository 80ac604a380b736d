"""A whole simulated service with the live one's decisions: against queueing theory, against its own rules, and fast."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.evaluate.simulation.arrivals import ArrivalProcess, Burst, Loss
from diagonal.evaluate.simulation.chunk_times import ChunkTimes, StepTime
from diagonal.evaluate.simulation.page import page
from diagonal.evaluate.simulation.service import Fleet
from diagonal.evaluate.simulation.sizing import Scenario, brief, cost_of, fewest_replicas
from jobs.benchmarks.service_policies import Scaling, policies
from jobs.benchmarks.simulate import work
from jobs.benchmarks.simulate_check import ALLOWED, Simulated, row, total

EIGHT_SLOTS = Config.from_preset("tiny", ["serve.max_sessions=8"])
TIMES = ChunkTimes("by hand", "known", (StepTime(2, 3, 1, 0.025), StepTime(2, 3, 4, 0.05)), 0.002, 0.05, 0.02)
SLOW = replace(TIMES, steps=(StepTime(2, 3, 1, 0.3), StepTime(2, 3, 4, 1.1)))  # two sessions at once, hardly


def scenario(replicas: int, viewers: int, times: ChunkTimes = TIMES, **other: Any) -> Scenario:
    arrivals = ArrivalProcess(
        viewers, **{name: other.pop(name) for name in ("stay_s", "retries", "patience_s") if name in other}
    )
    return Scenario(
        EIGHT_SLOTS, times, Fleet(replicas, start_s=other.pop("start_s", 20.0)), arrivals, policies, **other
    )


def erlang_b(offered: float, slots: int) -> float:
    """The share refused where `offered` sessions would be there at once and those without a slot go away."""
    blocked = 1.0
    for slot in range(1, slots + 1):
        blocked = offered * blocked / (slot + offered * blocked)
    return blocked


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "viewers"), [(1, 8), pytest.param(2, 12, marks=pytest.mark.nightly)])
def test_refusals_are_those_of_queueing_theory_where_slots_are_all_that_lacks(replicas: int, viewers: int) -> None:
    found = scenario(replicas, viewers, stay_s=15.0, last_s=1500.0, from_s=50.0).run()
    assert found["rejected_share"] == pytest.approx(erlang_b(viewers, 8 * replicas), abs=0.04)
    assert found["stall_s"] == 0.0
    assert found["chunk_interval_s"]["p50"] == pytest.approx(0.75, rel=0.01)


def test_who_has_no_time_is_refused_and_who_is_in_does_not_wait() -> None:
    found = scenario(1, 8, SLOW, last_s=200.0).run()
    assert found["refusals"].get("budget", 0) > 0 and found["peak_viewers"] < 8
    assert found["stall_rate"] < 0.01


@pytest.mark.slow
def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    first, again, other = (brief(scenario(2, 10, seed=seed).run()) for seed in (1, 1, 2))
    del first["cpu_s"], again["cpu_s"]
    assert first == again and first["chunk_interval_s"] != other["chunk_interval_s"]


@pytest.mark.slow
def test_a_lost_replica_moves_its_viewers_and_costs_those_that_have_no_room() -> None:
    roomy = cost_of(scenario(4, 12), losses=[Loss(70.0, 1)])
    assert roomy["moved"] > 0 and roomy["lost"] == 0
    assert roomy["recovered_after_s"] is not None and roomy["recovered_after_s"] < 20
    full = cost_of(scenario(2, 24, start_s=1000.0), losses=[Loss(70.0, 1)])
    assert full["stall_s"] > roomy["stall_s"] and full["lost"] + full["rejected"] > 0


@pytest.mark.slow
def test_more_viewers_at_once_are_refused_until_autoscaling_has_replicas_for_them() -> None:
    burst = Burst(70.0, 30)
    fixed = scenario(2, 8, stay_s=60.0, retries=20, last_s=240.0)
    scaled = replace(fixed, policies=partial(policies, partial(Scaling, 2, 12, 1.0, 300.0, 0.2)))
    refused = [
        cost_of(one, bursts=[burst])["rejected"] for one in (replace(fixed, arrivals=ArrivalProcess(8, 60.0)), scaled)
    ]
    assert refused[0] > 5 and refused[1] == 0
    assert max(second["replicas"] for second in scaled.run(bursts=[burst])["seconds"]) > 2


def test_replicas_that_are_no_longer_needed_go_without_anybody_noticing() -> None:
    scaling = partial(Scaling, 1, 8, 1.0, 10.0, 0.2)
    shrinking = replace(scenario(6, 4, last_s=150.0), policies=partial(policies, scaling))
    found = shrinking.run()
    assert found["seconds"][-1]["replicas"] < 6
    assert found["outcomes"].get("lost", 0) == 0 and found["stall_rate"] < 0.01


@pytest.mark.slow
@pytest.mark.nightly
def test_the_fewest_replicas_are_enough_and_one_fewer_is_not() -> None:
    asked = scenario(1, 20, stay_s=30.0, last_s=400.0, from_s=60.0)
    found = fewest_replicas(asked, 0.001, 0.02)
    assert (
        found["figures"]["rejected_share"] < 0.02 <= asked.with_replicas(found["replicas"] - 1).run()["rejected_share"]
    )


@pytest.mark.slow
def test_a_hundred_replicas_and_five_hundred_viewers_take_less_than_twelve_seconds_of_one_core() -> None:
    began_s = time.process_time()
    figures = scenario(100, 500, last_s=20.0, from_s=10.0).run()
    spent_s = time.process_time() - began_s
    assert figures["peak_viewers"] > 250
    assert spent_s < 12.0


@pytest.mark.slow
def test_a_plan_is_written_and_its_page_tells_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "capacity-small.json"
    assert work(["--viewers", "4,8", "--no-large", "--last", "60", "--from", "20", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [row["viewers"] for row in found["sizing"]] == [4, 8] and len(found["costs"]) == 6
    text = page({out: found})
    assert "| 8 | " in text and "not measured yet" in text and "capacity-small.png" in text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--viewers", "4,x"),
        ("--viewers", "0"),
        ("--stall-rate", "0"),
        ("--from", "9999"),
        ("--times", "/no/such.json"),
        ("--set", "serve.nothing=1"),
    ],
)
def test_a_wrong_option_is_refused_by_name_value_and_range(option: str, value: str) -> None:
    with pytest.raises(FieldError):
        work(["--viewers", "4", "--no-large", option, value])


def test_a_metric_is_summed_over_its_labels() -> None:
    text = 'ray_diagonal_x_total{a="1"} 2.0\nray_diagonal_x_total{a="2"} 3.5\nray_diagonal_x_total_y 9\ndiagonal_x 1\n'
    assert total(text, "diagonal_x_total") == 5.5


@pytest.mark.parametrize(("times", "replicas", "expected"), [(TIMES, 1, 8), (SLOW, 2, 2)])
def test_what_a_check_expects_to_be_admitted_is_bounded_by_slots_or_by_time(
    times: ChunkTimes, replicas: int, expected: int
) -> None:
    assert Simulated(EIGHT_SLOTS, times, Fleet(replicas)).capacity(20) == expected


def test_a_check_judges_what_is_measured_on_both_sides() -> None:
    assert row("x", 10.0, 11.0)["difference"] == pytest.approx(0.1)
    assert row("x", None, 11.0)["difference"] is None and row("x", 10.0, 11.0, judged=False)["difference"] is None
    assert ALLOWED == 0.15
