"""Is there room on the cluster for what a stage needs? Asked before it starts, as Ray itself waits in silence."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from diagonal.config import Config
from diagonal.errors import FieldError
from jobs.runs.run import say

SAY_EVERY_S, LOOK_EVERY_S = 30.0, 0.5
_SLACK = 1e-6  # shares of a GPU are no exact numbers

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Need:
    """`count` processes of a stage, each with so many CPUs and GPUs, on nodes of a pool ('' is any)."""

    what: str
    count: int
    cpus: float
    gpus: float = 0.0
    pool: str = ""

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return f"{self.count} {self.what} of {each}" + (f" in pool {self.pool!r}" if self.pool else "")


@dataclass(frozen=True)
class Node:
    """Resources of a node of the cluster, and the pool that its label names."""

    resources: Resources
    pool: str = ""


def training_needs(config: Config) -> list[Need]:
    """The fewest workers that a stage may go on with, and a reader of Ray Data beside them."""
    train = config.train
    workers = Need("workers", train.fewest_workers, train.cpus_per_worker, train.gpus_per_worker, train.pool)
    return [workers, Need("readers", 1, 1)]


def pairs_needs(config: Config) -> list[Need]:
    """One actor that solves and one that encodes text: with them Ray Data begins."""
    train = config.train
    return [Need("solvers", 1, 1, train.gpus_per_worker, train.pool), Need("text encoders", 1, 1)]


def wait_for_room(needs: Sequence[Need], patience_s: float) -> None:
    """Return when the needs fit into what is free, and say every half minute what is waited for.

    `FieldError` where the whole cluster is still too small for them after `patience_s`, and no autoscaler is known.
    """
    began_s, said_s = time.monotonic(), -SAY_EVERY_S
    while not fits(needs, _nodes(free=True)):
        waited_s, nodes = time.monotonic() - began_s, _nodes(free=False)
        could_fit = fits(needs, nodes)
        if waited_s >= patience_s and not could_fit and not _may_grow():
            raise _too_small(needs, nodes)
        if waited_s - said_s >= SAY_EVERY_S and waited_s >= LOOK_EVERY_S:
            why = "they are in use" if could_fit else "they are not there yet"
            say(f"waiting for {' and '.join(map(str, needs))}: {why}; the cluster has {_shown(nodes)}")
            said_s = waited_s
        time.sleep(LOOK_EVERY_S)


def _may_grow() -> bool:
    """Whether nodes may come by themselves: on Kubernetes, or where Ray's cluster launcher made the cluster."""
    launched = Path("~/ray_bootstrap_config.yaml").expanduser().exists()
    return os.environ.get("RAY_USAGE_STATS_KUBERAY_IN_USE") == "1" or launched


def fits(needs: Sequence[Need], nodes: Sequence[Node]) -> bool:
    """Whether all processes find a place, those with GPUs first."""
    left = [dict(node.resources) for node in nodes]
    for need in sorted(needs, key=lambda need: (-need.gpus, not need.pool)):
        missing = need.count
        for node, free in zip(nodes, left, strict=True):
            if need.pool in ("", node.pool):
                taken = min(missing, _room(need, free))
                free["CPU"] = free.get("CPU", 0.0) - taken * need.cpus
                free["GPU"] = free.get("GPU", 0.0) - taken * need.gpus
                missing -= taken
        if missing:
            return False
    return True


def _room(need: Need, free: Resources) -> int:
    """How many of a need's processes a node takes."""
    asked = {"CPU": need.cpus, "GPU": need.gpus}
    rooms = [int((free.get(name, 0.0) + _SLACK) / each) for name, each in asked.items() if each]
    return max(0, min(rooms, default=need.count))


def _nodes(free: bool) -> list[Node]:
    now = available_resources_per_node() if free else {}
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(now.get(node["NodeID"], {}) if free else node["Resources"], _pool(node.get("Labels") or {}))
        for node in alive
    ]


def _pool(labels: Mapping[str, Any]) -> str:
    return str(labels.get("pool", ""))


def _shown(nodes: Sequence[Node]) -> str:
    cpus, gpus = (sum(node.resources.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    return f"{cpus:g} CPU and {gpus:g} GPU on {len(nodes)} nodes"


def _too_small(needs: Sequence[Need], nodes: Sequence[Node]) -> FieldError:
    """What does not fit, by the setting that asks for it."""
    asked, has = (
        " and ".join(map(str, needs)),
        f"the cluster has {_shown(nodes)} (train.nodes_wait_s waits longer for an autoscaler)",
    )
    pools = {node.pool for node in nodes} - {""}
    for need in needs:
        if need.pool and need.pool not in pools:
            return FieldError(
                "train.pool", need.pool, f"one of the pools that nodes are labelled with: {sorted(pools)}"
            )
    gpus = max(need.gpus for need in needs)
    if gpus and not any(node.resources.get("GPU", 0.0) for node in nodes):
        return FieldError("train.gpus_per_worker", gpus, f"0 on a cluster without GPUs: {has}")
    return FieldError("train.workers", needs[0].count, f"fewer, or smaller ones: {asked} are needed; {has}")
