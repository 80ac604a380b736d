"""Worker processes that stand for the ranks of a training job: gloo on this machine, every wait with a deadline."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that start inside it: `gathers`, `scatters` (reduce-scatters) and the rest by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def gathers(self) -> int:
        return self.counts["_allgather_base_"]

    @property
    def scatters(self) -> int:
        return self.counts["_reduce_scatter_base_"]


class Ranks:
    """`world_size` processes in one process group; `run` calls a function in each and returns what they returned."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Connection]] = []
        self._starts = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")

    def run(self, function: Callable[..., Any], *args: Any, deadline_s: float = 100.0) -> list[Any]:
        """`function(rank, *args)` on every rank; a failure on any raises here with its traceback and ends them all."""
        self._workers = self._workers or self._start()
        end = time.monotonic() + deadline_s
        for _, pipe in self._workers:
            pipe.send((function, args))
        answers = [self._answer(rank, end) for rank in range(self.world_size)]
        failed = [f"rank {rank}:\n{value}" for rank, (fine, value) in enumerate(answers) if not fine]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def stop(self) -> None:
        """End the processes."""
        for process, _ in self._workers:
            process.kill()
            process.join(timeout=10.0)
        self._workers = []

    def _start(self) -> list[tuple[Any, Connection]]:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        store = os.path.join(self._folder.name, f"store{self._starts}")
        workers = []
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, there), daemon=True)
            process.start()
            workers.append((process, here))
        return workers

    def _answer(self, rank: int, end: float) -> tuple[bool, Any]:
        _, pipe = self._workers[rank]
        if not pipe.poll(max(end - time.monotonic(), 0.0)):
            return False, "no answer before the deadline"
        try:
            return pipe.recv()
        except EOFError:
            return False, "the process ended"


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = str(world_size)  # as Ray Train and torchrun tell each rank
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=30)
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:  # the test process reports it
            pipe.send((False, traceback.format_exc()))
