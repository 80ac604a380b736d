"""The load harness against the running service: what it counts, and that no bad session holds it up."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diagonal.client import BrokenStreamError
from diagonal.evaluate.load.figures import summarise
from jobs.benchmarks.load import arrivals, find_capacity, offer, overload, work
from jobs.benchmarks.load_sessions import Plan, Timeline
from serve.api.realtime import RealtimeLimits
from tests.serve.harness import FakeEngine, Service

FAST = Plan("", seconds=1.5, pacing="none")


def test_arrivals_are_random_but_the_same_for_one_seed() -> None:
    times = arrivals(4.0, seed=1, count=2000)
    assert times == arrivals(4.0, seed=1, count=2000) != arrivals(4.0, seed=2, count=2000)
    assert times == sorted(times) and 2000 / times[-1] == pytest.approx(4.0, rel=0.1)
    assert max(arrivals(4.0, seed=1, last_s=10.0)) < 10.0


@pytest.mark.parametrize("carrier", ["ws", "http"])
def test_every_session_of_a_load_is_checked_and_counted(service: Service, carrier: str) -> None:
    service.engine.config = service.engine.config.with_settings(["serve.max_sessions=3"])
    plan = dataclasses.replace(FAST, url=service.urls[0], change_every=1)
    traces = asyncio.run(offer(plan, [0.0, 0.3, 0.6], carrier))
    assert [(trace.outcome, trace.code, trace.frames) for trace in traces] == [("completed", "", 24)] * 3
    assert all(trace.first_frame_s is not None and trace.first_frame_s > 0 for trace in traces)
    found = summarise(traces)
    assert found["completed"] == 3 and found["chunk_interval_s"]["count"] == 6


@pytest.mark.slow
def test_a_changed_prompt_is_timed_to_its_chunk_and_to_the_screen(service: Service) -> None:
    plan = dataclasses.replace(FAST, url=service.urls[0], pacing="realtime", seconds=4.0)
    (trace,) = asyncio.run(offer(plan, [0.0], "ws"))
    assert trace.outcome == "completed" and len(trace.prompt_chunk_s) == 1
    assert 0 < trace.prompt_chunk_s[0] <= trace.prompt_shown_s[0]


@pytest.mark.slow
def test_who_is_refused_is_told_when_to_come_again_by_socket_and_by_http(service: Service, engine: FakeEngine) -> None:
    plan = dataclasses.replace(FAST, url=service.urls[0], pacing="realtime", seconds=8.0)
    found = summarise(traces := asyncio.run(offer(plan, [0.0, 0.1, 4.0, 4.1], "both")))
    assert [trace.outcome for trace in traces] == ["completed", "completed", "rejected", "rejected"]
    assert found["rejected"] == {"server_full": 2} and found["rejections_without_retry_after"] == 0
    assert found["rejection_s"]["count"] == 2


@pytest.mark.slow
def test_a_viewer_who_tells_his_position_is_not_sent_more_than_he_wants(service: Service) -> None:
    plan = dataclasses.replace(FAST, url=service.urls[0], pacing="realtime", seconds=3.0, credits_s=1.0)
    (trace,) = asyncio.run(offer(plan, [0.0], "ws"))
    assert trace.outcome == "completed" and trace.arrivals[-1][0] - trace.arrivals[0][0] > 0.75


@pytest.mark.slow
def test_a_session_that_fails_and_one_that_hangs_hold_up_nobody(service: Service, engine: FakeEngine) -> None:
    class Impatient(Plan):
        limit_s = 1.0

    engine.fail_at = 1
    plan = Impatient(service.urls[0], seconds=1.5, pacing="none")
    (failed,) = asyncio.run(offer(plan, [0.0], "ws"))
    assert (failed.outcome, failed.code, failed.frames) == ("failed", "generation_failed", 9)
    engine.allow(0)
    (hanging,) = asyncio.run(offer(plan, [0.0], "ws"))
    assert (hanging.outcome, hanging.code) == ("failed", "TimeoutError")
    (unreachable,) = asyncio.run(offer(dataclasses.replace(plan, url="http://127.0.0.1:9"), [0.0], "http"))
    assert (unreachable.outcome, unreachable.code) == ("failed", "ConnectError")


def test_a_part_out_of_place_is_seen(parts: list[bytes]) -> None:
    timeline = Timeline(16)
    assert [timeline.take(part) for part in parts] == [0, 9, 12]
    with pytest.raises(BrokenStreamError):
        timeline.take(parts[2])  # once more
    early = Timeline(16)
    early.take(parts[0])
    with pytest.raises(BrokenStreamError):
        early.take(parts[2])  # one is missing


@pytest.mark.slow
def test_the_capacity_is_what_the_service_admits_at_once(service: Service) -> None:
    capacity, traces = asyncio.run(find_capacity(Plan(service.urls[0])))
    assert capacity == 2 and all(trace.first_frame_s is not None for trace in traces)


@pytest.mark.slow
def test_an_overload_is_refused_and_over_when_it_ends(make_service: Callable[..., Service]) -> None:
    service = make_service(limits=RealtimeLimits())
    plan = Plan(service.urls[0], seconds=2.5)  # longer than the lead, so that a session lasts
    found: dict[str, Any] = asyncio.run(overload(plan, 2.0, seed=3, carrier="both"))
    figures = found["figures"]
    assert found["capacity"] == 2 and found["rate"] == 8.0 and found["recovered_s"] is not None
    assert figures["completed"] and sum(figures["rejected"].values()) > figures["completed"]
    assert figures["failed"] == {} and figures["rejections_without_retry_after"] == 0


def test_the_command_writes_figures_with_their_circumstances(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    work(["--url", service.urls[0], "--sessions", "2", "--rate", "5", "--seconds", "1", "--unpaced", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["kind"] == "load" and found["figures"]["completed"] == 2
    assert {"date", "machine", "command", "commit", "load", "plan"} <= set(found)
