"""Checkpoints that are cut off, altered or do not fit on the disk: an older whole one is used, and that is said."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import psutil

from diagonal.training.checkpoint_manifest import check_file, folder_name
from jobs.runs.update_log import Record
from tests.faults.conftest import StoppedRun
from tests.faults.job import EVERY, START_S, Launcher, difference
from tests.faults.nodes import Nodes, until
from tests.s3 import FaultyProxy


def test_altered_checkpoints_are_refused_loudly_and_the_one_before_them_used(
    cluster: Nodes, stopped: StoppedRun, nodes: list[Any], start: Launcher, tmp_path: Path, unbroken: Record
) -> None:
    """T4: of three, the newest has a bit flipped and the one before it is cut short."""
    storage = stopped.copied(tmp_path / "copy")
    oldest, middle, newest = sorted((tmp_path / "copy" / "r" / "train" / "distill" / "checkpoints").glob("update-*"))
    harmed = [(newest, harm(newest, "flipped")), (middle, harm(middle, "cut"))]
    job = start("--resume", storage=storage)
    job.line("resumes after update")
    refused = r"diagonal_checkpoints_refused_total\{[^}]*\} 2\.0"
    until("the metric", lambda: job.process.poll() is not None or re.search(refused, cluster.metrics()), START_S)
    assert job.process.poll() is None, "two refused ones are counted while the run goes on"
    job.trained()
    goes_on = job.record().starts[1]
    assert oldest.name.startswith(folder_name(goes_on["start_after"], "")) and len(goes_on["refused"]) == 2
    for folder, file in harmed:
        assert folder.name in str(goes_on["refused"]) and file.name in str(goes_on["refused"])
        assert any(folder.name in line and file.name in line for line in job.text.splitlines()), "it is said in the log"
    assert difference(job.record(), unbroken) == ""


def harm(folder: Path, way: str) -> Path:
    """Flip a bit in, or cut short, the largest file of a checkpoint; gives the file."""
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if way == "flipped" else data[: len(data) // 2])
    return file


def test_workers_killed_at_every_write_of_a_checkpoint_leave_the_one_before_it(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record, bucket: str, faulty_s3: FaultyProxy
) -> None:
    """T3: the second checkpoint's uploads are held one after another, and the workers killed meanwhile."""
    job = start(storage=f"s3://{bucket}/runs")
    until("the first checkpoint", job.checkpoints, START_S)
    for part in ("__0_0.distcp", "manifest.rank00.json", "manifest.rank01.json"):
        faulty_s3.slow(600, method="PUT", key=part)
        until(f"the upload of {part}", lambda: faulty_s3.held, START_S)
        for worker in cluster.train_workers():
            worker.kill()
        faulty_s3.drop()
        assert [found.update for found in job.checkpoints()] == [EVERY]
    job.trained()
    assert [entry["start_after"] for entry in job.record().starts] == [0, EVERY, EVERY, EVERY]
    assert difference(job.record(), unbroken) == ""


def test_a_full_disk_ends_the_run_with_its_cause_and_keeps_the_old_checkpoint(
    cluster: Nodes, nodes: list[Any], start: Launcher
) -> None:
    """T8: no file of a worker can grow, from the middle on."""
    job = start()
    job.update(EVERY + 1)
    until("the first checkpoint", job.checkpoints, START_S)
    for worker in cluster.train_workers():
        fill_disk(worker)
    assert job.ended() == 1
    said = job.error
    assert said.startswith("error: checkpoint ") and "File too large" in said and "Traceback" not in said, job.tail()
    [kept] = job.checkpoints()
    assert kept.update == EVERY
    for name in kept.files:
        check_file(kept, name, kept.folder.path / name)


def fill_disk(process: psutil.Process) -> None:
    """The process's writes fail from here on, as on a full disk; what it has mapped or opened stays."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
