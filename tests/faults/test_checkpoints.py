"""Checkpoints that are cut off, altered or do not fit on the disk: an older whole one is used, and that is said."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.journal import Record
from tests.faults.conftest import StoppedRun
from tests.faults.job import EVERY, Launcher, difference
from tests.faults.nodes import Nodes, until
from tests.s3 import FaultyProxy


def newest(storage: str) -> Path:
    """The folder of the newest checkpoint."""
    folders = sorted((Path(storage) / "r" / "train" / "distill" / "checkpoints").glob("update-*"))
    assert len(folders) >= 2
    return folders[-1]


@pytest.mark.parametrize("way", ["cut", "flipped"])
def test_an_altered_checkpoint_is_refused_loudly_and_the_one_before_it_used(
    way: str, stopped: StoppedRun, nodes: list[Any], start: Launcher, tmp_path: Path, unbroken: Record
) -> None:
    """T4."""
    storage = stopped.copied(tmp_path / "copy")
    folder = newest(storage)
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    harm(file, way)
    job = start("--resume", storage=storage)
    job.succeeded()
    goes_on = job.record().starts[1]
    assert goes_on["start_after"] == stopped.stopped_after // EVERY * EVERY < stopped.stopped_after
    assert len(goes_on["refused"]) == 1
    assert folder.name in str(goes_on["refused"]) and file.name in str(goes_on["refused"])
    assert folder.name in job.text and file.name in job.text, "it is said in the log"
    assert difference(job.record(), unbroken) == ""


def harm(file: Path, way: str) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if way == "flipped" else data[: len(data) // 2])


def test_workers_killed_at_every_write_of_a_checkpoint_leave_the_one_before_it(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record, bucket: str, faulty_s3: FaultyProxy
) -> None:
    """T3: the second checkpoint's uploads are held one after another, and the workers killed meanwhile."""
    job = start(storage=f"s3://{bucket}/runs")
    job.update(EVERY)
    until("the first checkpoint", job.checkpoints, 30)
    for part in ("__0_0.distcp", "manifest.rank00.json", "manifest.rank01.json"):
        faulty_s3.slow(600, method="PUT", key=part)
        until(f"the upload of {part}", lambda: faulty_s3.held, 120)
        for worker in cluster.train_workers():
            worker.kill()
        faulty_s3.drop()
        assert [found.update for found in job.checkpoints()] == [EVERY]
    job.succeeded()
    assert [entry["start_after"] for entry in job.record().starts] == [0, EVERY, EVERY, EVERY]
    assert difference(job.record(), unbroken) == ""


def test_a_full_disk_ends_the_run_with_its_cause_and_the_old_checkpoint_is_gone_on_from(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record
) -> None:
    """T8: no file of a worker can grow, from the middle on."""
    job = start()
    job.update(EVERY + 1)
    until("the first checkpoint", job.checkpoints, 30)
    for worker in cluster.train_workers():
        fill_disk(worker)
    assert job.ended() == 1
    said = job.text.splitlines()[-1]
    assert "error: checkpoint " in said and "File too large" in said and "Traceback" not in said, job.tail()
    assert [found.update for found in job.checkpoints()] == [EVERY]
    again = start("--resume")
    again.succeeded()
    assert [entry["start_after"] for entry in again.record().starts] == [0, EVERY]
    assert difference(again.record(), unbroken) == ""


def fill_disk(process: psutil.Process) -> None:
    """The process's writes fail from here on, as on a full disk; what it has mapped or opened stays."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))

