"""What ranks say to one another over the CPU: one answer for all, one rank's value, everybody's values."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from diagonal.storage import StorageError

T = TypeVar("T")
Group = dist.ProcessGroup | None


GROUP_LOST = "this rank's process group was ended under it"


class GroupLostError(RuntimeError):
    """This rank's process group was ended while it trained: another rank is lost, and all begin again."""

    def __init__(self) -> None:
        super().__init__(GROUP_LOST)


def is_grouped() -> bool:
    """Whether this process is in a process group.

    Raises `GroupLostError` where it no longer is: Ray Train, when a rank is lost, ends the group of the others while
    they still train, and none of them may then take itself for the only rank. Ray Train and torchrun give each rank
    the variable `WORLD_SIZE`.
    """
    grouped = dist.is_initialized()
    if not grouped and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GroupLostError
    return grouped


def own_rank() -> int:
    """This process's rank; 0 where it is the only one. Raises as `is_grouped` does."""
    return dist.get_rank() if is_grouped() else 0


def world_size() -> int:
    """The number of ranks; 1 where this process is the only one. Raises as `is_grouped` does."""
    return dist.get_world_size() if is_grouped() else 1


def gloo_group(timeout_s: float = 1800.0) -> Group:
    """A group of all ranks of its own, over the CPU; None without a process group. Collective.

    Two threads never share one: collectives of one group must come in one order on all ranks. A rank waits up to
    `timeout_s` for the slowest.
    """
    if not is_grouped():
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def highest(value: int, group: Group) -> int:
    """The highest value of all ranks, on every rank."""
    if not is_grouped():
        return value
    values = torch.tensor(value)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return int(values.item())


def gathered(value: T, group: Group) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if not is_grouped():
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
    if is_grouped():
        dist.broadcast_object_list(answer, src=0, group=group)
    value, failure = answer[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]
