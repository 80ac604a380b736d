"""A Ray cluster of several raylets on this machine, and the processes that a fault test ends, stops or freezes."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil

from tests.conftest import started_patiently

T = TypeVar("T")
NOTICE_LOSS = {
    "health_check_initial_delay_ms": "1000",
    "health_check_period_ms": "1000",
    "health_check_failure_threshold": "3",
    "health_check_timeout_ms": "5000",
}
METRICS_OFTEN = {"metrics_report_interval_ms": "500"}
NODE_CPUS = 3  # one worker of two, and room for its data
TRAIN_WORKER = "ray::RayTrainWorker"


class Nodes:
    """The cluster: a head that runs no work, and nodes that come and go."""

    def __init__(self, folder: str) -> None:
        from ray._private.utils import get_ray_address_file
        from ray.cluster_utils import Cluster

        # Ray also tells its default folder where the cluster is, and does not make it
        Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
        head = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": False, "object_store_memory": 200 * 2**20}
        start = partial(Cluster, initialize_head=True, shutdown_at_exit=False, head_node_args=head)
        self._cluster: Any = started_patiently(start)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        """Start a node; from the main thread alone."""
        return self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=200 * 2**20)

    def kill(self, node: Any) -> None:
        """SIGKILL a raylet; its workers end with it, and nobody is told."""
        workers = children(node)
        os.kill(raylet(node), signal.SIGKILL)
        for worker in workers:
            if worker.is_running():
                worker.kill()
        self._cluster.worker_nodes.discard(node)
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def clear(self) -> None:
        """Take all nodes but the head away."""
        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.clear()
        self._cluster.shutdown()

    @contextmanager
    def with_nodes(self, count: int) -> Iterator[list[Any]]:
        """Fresh nodes, gone at the end."""
        try:
            yield [self.add() for _ in range(count)]
        finally:
            self.clear()

    def metrics(self) -> str:
        """What Prometheus would read from all nodes now."""
        pages = []
        for node in self._cluster.global_state.node_table():
            if node["Alive"]:
                try:
                    pages.append(httpx2.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10).text)
                except httpx2.HTTPError:
                    continue  # its agent is still starting
        return "\n".join(pages)

    def train_workers(self, node: Any | None = None) -> list[psutil.Process]:
        """The processes of Ray Train's workers, on one node or on all, oldest first."""
        nodes = [node] if node is not None else list(self._cluster.worker_nodes)
        found = [process for one in nodes for process in children(one) if title(process).startswith(TRAIN_WORKER)]
        return sorted(found, key=lambda process: process.create_time())


@contextmanager
def start_nodes() -> Iterator[Nodes]:
    """A cluster without nodes, ended by its process ids."""
    for name, value in {**NOTICE_LOSS, **METRICS_OFTEN}.items():
        os.environ[f"RAY_{name}"] = value
    folder = tempfile.mkdtemp(prefix="df-")
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.close()
        for name in (*NOTICE_LOSS, *METRICS_OFTEN):
            os.environ.pop(f"RAY_{name}", None)
        shutil.rmtree(folder, ignore_errors=True)


def raylet(node: Any) -> int:
    """The process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


def children(node: Any) -> list[psutil.Process]:
    """What a node's raylet has started."""
    try:
        return psutil.Process(raylet(node)).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """The first word of a process's command line, which Ray sets to what it runs."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def until(what: str, found: Callable[[], T], deadline_s: float, every_s: float = 0.05) -> T:
    """The first true answer of `found`; `TimeoutError` names what did not come."""
    end_s = time.monotonic() + deadline_s
    while not (answer := found()):
        if time.monotonic() > end_s:
            raise TimeoutError(f"{what}: not within {deadline_s:.0f} s")
        time.sleep(every_s)
    return answer
