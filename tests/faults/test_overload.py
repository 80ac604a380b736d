"""Ten times the load that is admitted, on a real Ray Serve: who is in plays on, the others are told at once (S4)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from diagonal.evaluate.load_figures import table
from diagonal.evaluate.serving_report import overload_text
from jobs.load import overload
from jobs.load_sessions import Plan
from tests.faults.serving import LiveService

LAST_S = 15.0  # a minute by `python -m jobs.load --overload`


@pytest.fixture
def service(ray_cluster: str, tmp_path: Path) -> Iterator[LiveService]:
    """One gateway in front of one replica of the embedded release."""
    live = LiveService(str(tmp_path / "serve"))
    try:
        live.start(replicas=1, gateways=1)
        yield live
    finally:
        live.close()


def test_an_overload_is_refused_at_once_and_those_who_are_in_play_on(
    service: LiveService, capsys: pytest.CaptureFixture[str]
) -> None:
    found = asyncio.run(overload(Plan(service.url, seconds=5.0), LAST_S, seed=1, carrier="both"))
    figures = found["figures"]
    with capsys.disabled():
        print(f"\n{overload_text(found)}\n{table(figures)}")
    assert figures["failed"] == {}, "whoever was admitted got all of his stream"
    assert sum(figures["rejected"].values()) > 4 * figures["completed"]
    assert set(figures["rejected"]) == {"server_full"} and figures["rejections_without_retry_after"] == 0
    assert figures["session_fps"]["least"] >= 16
    assert figures["first_frame_s"]["p95"] <= 2 * found["calm_first_frame_s"]["greatest"] + 0.1
    assert figures["rejection_s"]["p95"] <= 0.1
    assert found["recovered_s"] is not None and found["recovered_s"] < 10
