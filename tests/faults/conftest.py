"""Fixtures of the fault tests: one Ray cluster for all, fresh nodes for each, and runs that several tests look at."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.runs.update_log import Record
from tests.faults.job import MIDDLE, Launcher
from tests.faults.nodes import Nodes, start_nodes

NODES = 2


@dataclass(frozen=True)
class StoppedRun:
    """A run that SIGTERM ended before its time: what it left, and how it went."""

    storage: Path
    status: int
    stopped_in_s: float
    text: str
    record: Record

    def copied(self, target: Path) -> str:
        """A copy of the run's storage, to go on with."""
        shutil.copytree(self.storage, target)
        return str(target)

    @property
    def stopped_after(self) -> int:
        return int(self.record.updates[-1]["update"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are fault tests; a minute or two each, on a busy machine more."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Nodes]:
    """A head that runs no work."""
    with start_nodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[list[Any]]:
    """Two fresh nodes, each with room for one worker."""
    with cluster.with_nodes(NODES) as found:
        yield found


@pytest.fixture
def start(cluster: Nodes, tmp_path: Path) -> Iterator[Launcher]:
    """Starts jobs; ends those that a test left running."""
    launcher = Launcher(cluster.address, tmp_path)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def unbroken(cluster: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The record of a run to which nothing happens."""
    with launching(cluster, tmp_path_factory.mktemp("unbroken")) as start:
        job = start()
        job.succeeded()
        return job.record()


@pytest.fixture(scope="session")
def stopped(cluster: Nodes, tmp_path_factory: pytest.TempPathFactory) -> StoppedRun:
    """A run that SIGTERM ends after its middle; checkpoints lie behind it, and work before it."""
    folder = tmp_path_factory.mktemp("stopped")
    with launching(cluster, folder) as start:
        job = start()
        job.update(MIDDLE)
        job.terminate()
        asked_s = time.monotonic()
        status = job.ended(120)
        return StoppedRun(folder / "runs", status, time.monotonic() - asked_s, job.text, job.record())


@contextmanager
def launching(cluster: Nodes, folder: Path) -> Iterator[Launcher]:
    """Two fresh nodes and a launcher, for fixtures of the session."""
    launcher = Launcher(cluster.address, folder)
    try:
        with cluster.with_nodes(NODES):
            yield launcher
    finally:
        launcher.close()
