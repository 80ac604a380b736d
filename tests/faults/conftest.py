"""Fixtures of the fault tests: one Ray cluster for all, two fresh nodes for each, and jobs that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.job import Job, start_job
from tests.faults.nodes import Nodes, start_nodes

StartJob = Callable[..., Job]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are fault tests; a minute or two each, on a busy machine more."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Nodes]:
    """A head that runs no work."""
    with start_nodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    """The cluster with two fresh nodes, each with room for one worker."""
    cluster.add()
    cluster.add()
    yield cluster
    cluster.clear()


@pytest.fixture
def start(cluster: Nodes, tmp_path: Path) -> Iterator[StartJob]:
    """Starts the distillation (or another job) by run name, with settings; ends what a test left running."""
    started: list[Job] = []

    def start_one(name: str = "r", *arguments: str, job: str = "distill", storage: str = "", **others: Any) -> Job:
        settings, environment = others.pop("settings", {}), others.pop("environment", {})
        log = tmp_path / f"{len(started)}-{name}.log"
        one = start_job(job, name, storage or str(tmp_path / "runs"), log, cluster.address, settings, arguments,
                        environment)  # fmt: skip
        started.append(one)
        return one

    yield start_one
    for job in started:
        job.close()
