"""A run on S3 while S3 is away, in error, slow or cut short: training goes on, and no half of a file ever counts."""

from __future__ import annotations

import re
import time
from typing import Any

from jobs.runs.update_log import Record
from tests.faults.job import START_S, Job, Launcher, difference
from tests.faults.nodes import Nodes, until
from tests.s3 import SECRET_KEY, FaultyProxy

OUTAGE_S = 60.0


def test_training_continues_through_an_outage_of_a_minute_and_bad_answers(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record, bucket: str, faulty_s3: FaultyProxy
) -> None:
    """T5: the storage goes away once there is a checkpoint; a worker is lost meanwhile; then it answers badly."""
    job = start(storage=f"s3://{bucket}/runs", settings={"distill.checkpoint_every": 1})
    until("the first checkpoint", job.checkpoints, START_S)
    seen = len(job.text)
    ends = faulty_s3.outage_for(OUTAGE_S)
    until("an update without storage", lambda: re.search(r"(update |'update': )\d+\b", job.text[seen:]), OUTAGE_S)
    faulty_s3.truncate(times=8, key=".distcp")
    faulty_s3.fail(500, "InternalError", times=6)
    faulty_s3.slow(2.0, times=6)
    cluster.train_workers()[0].kill()
    assert ends.is_alive(), "all this while the storage is away"
    job.succeeded()
    assert faulty_s3.count("GET", ".distcp") > 8, "the restart read through answers that were cut short"
    assert len(job.record().starts) >= 2 and difference(job.record(), unbroken) == ""
    whole(job)
    assert SECRET_KEY not in job.text


def whole(job: Job) -> None:
    """Every checkpoint that counts has the bytes that its manifests say."""
    sizes = (job.folder / "train" / "distill" / "checkpoints").files()
    found = job.checkpoints()
    assert found
    for checkpoint in found:
        for name, entry in checkpoint.files.items():
            assert sizes[f"{checkpoint.folder.name}/{name}"] == entry["bytes"]


def test_an_outage_longer_than_the_patience_ends_the_run_and_names_the_storage(
    nodes: list[Any], start: Launcher, bucket: str, faulty_s3: FaultyProxy
) -> None:
    """T5, too long."""
    settings = {"train.storage_patience_s": 5, "train.max_failures": 0}
    job = start(storage=f"s3://{bucket}/runs", settings=settings)
    until("the first checkpoint", job.checkpoints, START_S)
    with faulty_s3.outage():
        away_s = time.monotonic()
        assert job.ended(180) == 1
        assert time.monotonic() - away_s < 120
    assert f"s3://{bucket}/runs/r" in job.error
    assert "Traceback" not in job.error and SECRET_KEY not in job.text
    whole(job)
