"""What a load came to: playback, percentiles and the summary, on hand-made sessions; and the page that tells them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diagonal.evaluate.load.figures import Player, Trace, percentiles, summarise, table
from diagonal.evaluate.load.page import page, write_page


def test_a_player_starts_with_two_chunks_or_when_enough_is_buffered() -> None:
    player = Player(0.9)
    player.arrived(1.0, 0.5)
    assert player.position_s(5.0) == 0.0
    player.arrived(2.0, 0.25)  # the second one
    assert player.position_s(2.5) == 0.5
    at_once = Player(0.9)
    at_once.arrived(1.0, 0.9)
    assert at_once.position_s(1.25) == 0.25


def test_a_late_chunk_is_one_stall_and_everything_after_it_is_later() -> None:
    player = Player(0.5)
    player.arrived(0.0, 1.0)
    player.arrived(0.5, 1.0)
    assert (player.stalls, player.shown_s(1.5)) == (0, 1.5)
    player.arrived(3.0, 1.0)
    assert (player.stalls, player.stall_s) == (1, 1.0)
    assert player.position_s(3.5) == 2.5 and player.shown_s(2.0) == 3.0
    player.arrived(4.0, 1.0)  # the moment at which it is wanted is in time
    assert player.stalls == 1


def test_a_player_never_plays_what_it_does_not_have() -> None:
    player = Player(0.5)
    player.arrived(0.0, 1.0)
    assert player.position_s(100.0) == 1.0


@pytest.mark.parametrize(("rank", "expected"), [(50, 50), (95, 95), (99, 99)])
def test_percentiles_are_values_that_were_seen(rank: int, expected: int) -> None:
    assert percentiles([None, *map(float, range(100, 0, -1))])[f"p{rank}"] == expected


def test_of_nothing_there_are_no_percentiles() -> None:
    assert percentiles([None]) == {"count": 0, "least": None, "p50": None, "p95": None, "p99": None, "greatest": None}


@pytest.fixture
def traces() -> list[Trace]:
    """One that played, one that was refused, one that failed in mid stream."""
    played = Trace(asked_s=1.0, outcome="completed", arrivals=[(1.2, 9), (1.95, 12), (2.7, 12)], prompt_chunk_s=[0.5])
    refused = Trace(asked_s=2.0, outcome="rejected", code="server_full", answered_s=0.03, retry_after_s=2.0)
    failed = Trace(asked_s=2.0, code="wrong_hash", arrivals=[(2.5, 9)], stalls=1, stall_s=0.4)
    return [played, refused, failed]


def test_the_summary_counts_by_outcome_and_code(traces: list[Trace]) -> None:
    found = summarise(traces)
    assert (found["sessions"], found["completed"], found["frames"]) == (3, 1, 42)
    assert found["rejected"] == {"server_full": 1} and found["failed"] == {"wrong_hash": 1}
    assert found["first_frame_s"]["count"] == 2 and found["first_frame_s"]["greatest"] == 0.5
    assert found["session_fps"]["least"] == pytest.approx(24 / 1.5)
    assert found["chunk_interval_s"]["p99"] == pytest.approx(0.75)
    assert found["rejection_s"]["p95"] == 0.03 and found["rejections_without_retry_after"] == 0
    assert (found["stalls"], found["stall_s"], found["sessions_with_stalls"]) == (1, 0.4, 1)
    text = table(found)
    assert "1 (1 server_full) rejected" in text and "| rejection, ms | 30 | 30 | 30 | 30 | 1 |" in text


def test_a_load_without_any_session_is_summarised_too() -> None:
    assert "0 sessions" in table(summarise([]))


def test_the_page_tells_what_was_measured_and_what_was_not(traces: list[Trace], tmp_path: Path) -> None:
    assert page([]).count("not measured") == 6 and page([]).count("Not measured.") == 3
    about = {
        "date": "2026-01-02",
        "machine": "m",
        "load": 0.1,
        "commit": "abc",
        "command": "python -m jobs.benchmarks.load",
    }
    over = about | {
        "kind": "overload",
        "capacity": 4,
        "rate": 8.0,
        "last_s": 60.0,
        "recovered_s": 1.25,
        "calm_first_frame_s": percentiles([0.1]),
        "figures": summarise(traces),
    }
    ways = {"in_process": 50.0, "service": 46.7}
    rates = {
        way: {"fps": percentiles([fps]), "clip_fps": percentiles([fps]), "first_frame_s": percentiles([0.1])}
        for way, fps in ways.items()
    }
    against = (
        about
        | rates
        | {
            "kind": "in-process",
            "fps_ratio": 0.934,
            "clip_fps_ratio": 0.871,
            "first_frame_later_s": 0.042,
            "clips": 3,
            "frames": 81,
            "rounds": 2,
            "engine_cpu": 0,
        }
    )
    for found in (over, against):
        (tmp_path / f"serving-{found['kind']}.json").write_text(json.dumps(found))
    text = write_page(tmp_path / "serving.md")
    assert text == (tmp_path / "serving.md").read_text() and text.count("not measured") == 0
    for figure in (
        "0.934 (0.871",
        "+42 ms",
        "16.0",
        "30 ms",
        "1.2 s",
        "python -m jobs.benchmarks.load",
        "Not measured.",
    ):
        assert figure in text
