"""Workers and nodes that are lost: the run goes on from its checkpoint, and what it learns is what it would have."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from jobs.runs.update_log import Record
from tests.faults.job import EVERY, MIDDLE, UPDATES_IN_ALL, Job, Launcher, difference, sample_numbers
from tests.faults.nodes import Nodes, until

ALL_SAMPLES = list(range(UPDATES_IN_ALL * 4))


def went_on(job: Job, lost_after: int) -> None:
    """It began anew once, from a checkpoint at most one interval before."""
    starts = job.record().starts
    assert [start["start_after"] for start in starts[:1]] == [0] and len(starts) == 2, starts
    assert lost_after - EVERY <= starts[1]["start_after"] <= lost_after + 1, (starts, lost_after)


@pytest.mark.ci
def test_a_killed_worker_costs_at_most_one_interval_and_changes_no_bit(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record
) -> None:
    """T1."""
    job = start()
    done = job.update(MIDDLE)
    cluster.train_workers()[1].kill()
    job.succeeded()
    went_on(job, done)
    assert difference(job.record(), unbroken) == ""


def test_a_lost_node_leaves_a_run_that_trains_every_sample_once_on_the_rest(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record
) -> None:
    """T2, elastic."""
    job = start(settings={"train.min_workers": 1})
    done = job.update(MIDDLE)
    cluster.kill(nodes[1])
    job.trained()
    went_on(job, done)
    record = job.record()
    assert [entry["world_size"] for entry in record.starts] == [2, 1]
    assert sample_numbers(record) == ALL_SAMPLES == sample_numbers(unbroken)
    for entry, expected in zip(record.updates, unbroken.updates, strict=True):
        assert abs(entry["critic"] - expected["critic"]) < 1e-3 * abs(expected["critic"]), (entry, expected)


def test_a_run_that_needs_all_its_workers_waits_for_a_new_node(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record
) -> None:
    """T2, of fixed size."""
    job = start()
    done = job.update(MIDDLE)
    cluster.kill(nodes[0])
    job.line("workers failed")
    time.sleep(5)
    assert job.process.poll() is None and len(job.record().starts) == 1, "it waits"
    cluster.add()
    job.trained()
    went_on(job, done)
    assert difference(job.record(), unbroken) == ""


def test_a_frozen_worker_is_replaced_within_its_timeout(
    cluster: Nodes, nodes: list[Any], start: Launcher, unbroken: Record
) -> None:
    """T9: no signal, no closed connection; only progress that does not come."""
    timeout_s = 40  # a busy machine pauses for many seconds by itself
    job = start(settings={"train.stall_timeout_s": timeout_s})
    done = job.update(MIDDLE)
    frozen = cluster.train_workers()[1]
    os.kill(frozen.pid, signal.SIGSTOP)
    frozen_s = time.monotonic()
    try:
        until("the frozen worker's end", lambda: not frozen.is_running() or frozen.status() == "zombie", 3 * timeout_s)
        assert time.monotonic() - frozen_s < 2 * timeout_s
        job.trained()
    finally:
        if frozen.is_running():
            frozen.kill()
    went_on(job, done)
    assert difference(job.record(), unbroken) == ""
