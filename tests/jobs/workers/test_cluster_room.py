"""Room on the cluster: what can fit is waited for with a word, what cannot ends with a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from diagonal.config import Config
from diagonal.errors import FieldError
from jobs.workers import cluster_room
from jobs.workers.cluster_room import Need, Node, fits, pairs_needs, training_needs, wait_for_room

CPUS = Node({"CPU": 8.0})
GPUS = Node({"CPU": 16.0, "GPU": 8.0}, pool="train")


@pytest.mark.parametrize(
    ("needs", "nodes", "expected"),
    [
        ([Need("workers", 8, 1, 1)], [GPUS], True),
        ([Need("workers", 9, 1, 1)], [GPUS], False),
        ([Need("workers", 9, 1, 1)], [GPUS, GPUS], True),
        ([Need("workers", 8, 1), Need("readers", 1, 1)], [CPUS], False),
        ([Need("workers", 8, 1), Need("readers", 1, 1)], [CPUS, CPUS], True),
        ([Need("workers", 2, 6)], [CPUS], False),  # on one node each
        ([Need("workers", 1, 1, pool="train")], [CPUS], False),
        ([Need("readers", 8, 1), Need("workers", 8, 1, 1, "train")], [GPUS, CPUS], True),
        ([Need("workers", 3, 0.1, 0.3)], [Node({"CPU": 1.0, "GPU": 0.9})], True),
        ([Need("workers", 1, 1)], [], False),
    ],
)
def test_processes_are_placed_on_nodes(needs: Sequence[Need], nodes: Sequence[Node], expected: bool) -> None:
    assert fits(needs, nodes) == expected


def with_nodes(monkeypatch: pytest.MonkeyPatch, *states: tuple[list[Node], list[Node]]) -> None:
    """The cluster shows these (free, whole) nodes one look after the other, the last ones for ever."""
    left = list(states)

    def nodes(free: bool) -> list[Node]:
        found = left[0][0 if free else 1]
        if not free and len(left) > 1:
            left.pop(0)
        return found

    monkeypatch.setattr(cluster_room, "_nodes", nodes)
    monkeypatch.setattr(cluster_room, "LOOK_EVERY_S", 0.01)


@pytest.mark.parametrize(
    ("settings", "nodes", "said"),
    [
        (["train.gpus_per_worker=1"], [CPUS], "train.gpus_per_worker = 1.*without GPUs.*8 CPU and 0 GPU on 1 nodes"),
        (["train.pool=train"], [CPUS], r"train.pool = 'train'.*labelled with: \[\]"),
        (["train.workers=8"], [CPUS], "train.workers = 8.*8 workers of 1 CPU and 1 readers of 1 CPU are needed"),
    ],
)
def test_what_the_cluster_can_never_hold_ends_with_a_sentence(
    settings: list[str], nodes: list[Node], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nodes(monkeypatch, (nodes, nodes))
    with pytest.raises(FieldError, match=said):
        wait_for_room(training_needs(Config.from_preset("tiny", settings)), 0.05)


def test_a_gpu_preset_without_gpus_is_told_so_before_pairs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_nodes(monkeypatch, ([CPUS], [CPUS]))
    with pytest.raises(FieldError, match="without GPUs"):
        wait_for_room(pairs_needs(Config.from_preset("wan-1.3b", [])), 0.0)


def test_nodes_that_are_busy_or_still_come_are_waited_for_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster_room, "SAY_EVERY_S", 0.0)
    busy = Node({"CPU": 0.0})
    with_nodes(monkeypatch, ([], []), ([], []), ([busy], [CPUS]), ([busy], [CPUS]), ([CPUS], [CPUS]))
    wait_for_room([Need("workers", 2, 1)], 5.0)
    said = capsys.readouterr().out
    assert "waiting for 2 workers of 1 CPU: they are not there yet; the cluster has 0 CPU and 0 GPU on 0 nodes" in said
    assert "waiting for 2 workers of 1 CPU: they are in use; the cluster has 8 CPU and 0 GPU on 1 nodes" in said
