"""Runs that are stopped and gone on with: by a scheduler's SIGTERM, with other settings, with another world size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.runs.update_log import Record
from tests.faults.conftest import StoppedRun
from tests.faults.job import Launcher, difference, sample_numbers

SOON_S = 90.0  # a busy machine's; the page of the last run says how long it took


def test_sigterm_ends_a_run_soon_with_a_checkpoint_and_says_how_to_resume(
    stopped: StoppedRun, record_property: Callable[[str, object], None]
) -> None:
    """T8."""
    record_property("stopped after, s", round(stopped.stopped_in_s, 1))
    assert stopped.stopped_in_s < SOON_S and stopped.status == 128 + 15
    assert "resume with --name r --resume" in stopped.text
    assert f"stopped after update {stopped.stopped_after}" in stopped.text


def test_a_stopped_run_goes_on_from_its_last_update_to_the_bit(
    stopped: StoppedRun, nodes: list[Any], start: Launcher, tmp_path: Path, unbroken: Record
) -> None:
    job = start("--resume", storage=stopped.copied(tmp_path / "copy"))
    job.succeeded()
    assert [entry["start_after"] for entry in job.record().starts] == [0, stopped.stopped_after]
    assert difference(job.record(), unbroken) == ""


def test_a_setting_that_decides_the_result_is_refused_by_name_on_a_resume(
    stopped: StoppedRun, start: Launcher, tmp_path: Path
) -> None:
    """T10: before any worker starts, and nothing is changed; of other settings, tests/jobs/runs/test_run.py."""
    storage = stopped.copied(tmp_path / "copy")
    job = start("--resume", storage=storage, settings={"distill.batch_size": 8})
    before = job.folder.files()
    assert job.ended() == 2
    assert "error: distill.batch_size = " in job.text and "as run 'r' began with" in job.text, job.text
    assert job.folder.files() == before


def test_another_number_of_workers_takes_the_state_over_and_learns_the_same(
    stopped: StoppedRun, nodes: list[Any], start: Launcher, tmp_path: Path, unbroken: Record
) -> None:
    """T10: 2 workers to 1. Sums over one worker round differently, so the losses agree closely and not to the bit."""
    job = start("--resume", storage=stopped.copied(tmp_path / "copy"), settings={"train.workers": 1})
    job.trained()
    record = job.record()
    assert [entry["world_size"] for entry in record.starts] == [2, 1]
    assert sample_numbers(record) == sample_numbers(unbroken)
    for entry, expected in zip(record.updates, unbroken.updates, strict=True):
        assert abs(entry["critic"] - expected["critic"]) < 1e-3 * abs(expected["critic"]), (entry, expected)
