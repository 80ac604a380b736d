"""More nodes of the local cluster: raylets beside the head's on this machine, each in a pool, each ended by its id."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from infra.local import ports, processes
from infra.local.cluster import START_S, ClusterError, member_environment
from infra.local.run import LocalRun

OBJECT_STORE_BYTES = 128 * 2**20
WORKER_PORTS = 200  # of each node
LAST_PORT = 32000  # from there on Linux takes ports for outgoing connections


@dataclass(frozen=True)
class Node:
    """One raylet: its pool, the port that marks its command line, and its process."""

    pool: str
    metrics_port: int
    raylet: psutil.Process


@dataclass
class Nodes:
    """Adds nodes to `run`; `cluster.stop` ends them with it, for they carry its mark."""

    run: LocalRun
    _next_port: int = field(init=False)
    _taken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._next_port = self.run.ports.last_worker + 1

    def add(self, pool: str, cpus: int) -> Node:
        """Start a node with that label and so many logical CPUs; ClusterError when it does not come up."""
        first, last = ports.choose_block(range(self._next_port, LAST_PORT, WORKER_PORTS))
        self._next_port = last + 1
        metrics, agent = self._port(18080), self._port(18365)
        options = {
            "address": self.run.address,
            "num-cpus": cpus,
            "labels": f"pool={pool}",
            "object-store-memory": OBJECT_STORE_BYTES,
            "metrics-export-port": metrics,
            "dashboard-agent-listen-port": agent,
            "min-worker-port": first,
            "max-worker-port": last,
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
        done = subprocess.run(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            cwd=self.run.root,
            env=member_environment(self.run),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        if done.returncode != 0:
            raise ClusterError(f"a node of {pool} did not start: {done.stdout}{done.stderr}")
        return Node(pool, metrics, self._raylet(metrics))

    def lose(self, node: Node) -> None:
        """SIGKILL its raylet, as a machine that loses its power; what ran there ends with it."""
        if not processes.send(node.raylet, signal.SIGKILL):
            raise ClusterError(f"the raylet {node.raylet.pid} of {node.pool} was gone already")

    def _port(self, preferred: int) -> int:
        port = ports.choose(preferred, self._taken)
        self._taken.add(port)
        return port

    def _raylet(self, metrics_port: int) -> psutil.Process:
        mark = f"--metrics-export-port={metrics_port}"
        for process in self.run.members:
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline() or [""]
                if words[0].endswith("/raylet") and any(mark in word for word in words):
                    return process
        raise ClusterError(f"no raylet with {mark} is running")
