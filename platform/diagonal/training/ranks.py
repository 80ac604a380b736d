"""What ranks say to one another over the CPU: one answer for all, one rank's value, everybody's values."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from diagonal.storage import StorageError

T = TypeVar("T")
Group = dist.ProcessGroup | None


def own_rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gloo_group(timeout_s: float = 1800.0) -> Group:
    """A group of all ranks of its own, over the CPU; None without a process group. Collective.

    Two threads never share one: collectives of one group must come in one order on all ranks. A rank waits up to
    `timeout_s` for the slowest.
    """
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def highest(value: int, group: Group) -> int:
    """The highest value of all ranks, on every rank."""
    if not dist.is_initialized():
        return value
    values = torch.tensor(value)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return int(values.item())


def gathered(value: T, group: Group) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def from_rank_0(call: Callable[[], T], group: Group) -> T:
    """What `call` gives on rank 0, on every rank; a storage's error there is raised on every rank."""
    answer: list[tuple[T | None, OSError | StorageError | None]] = [(None, None)]
    if own_rank() == 0:
        try:
            answer = [(call(), None)]
        except (OSError, StorageError) as error:
            answer = [(None, error)]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0, group=group)
    value, failure = answer[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]
