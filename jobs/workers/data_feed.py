"""What a rank learns from: its samples of each update, through Ray Data, from any update on, for any world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext

from diagonal.data.prompts import samples
from diagonal.training.batch_partition import own_samples

Columns = dict[str, Any]
ROWS_IN_BLOCK = 1024


@dataclass(frozen=True)
class Feed:
    """All samples of a stage, and what is done to them; the same on all ranks.

    Row n of `rows` is global sample n. `read` is a class that Ray Data maps over the rows, with its arguments. Sample
    videos are drawn for `captions`.
    """

    rows: pa.Table
    batch_size: int
    updates: int
    read: tuple[type, dict[str, Any]] | None = None
    captions: Sequence[str] = ()

    def own_rows(self, done: int, rank: int, ranks: int) -> pa.Table:
        """The rows of `rank` after `done` updates, with the column `sample`, in order."""
        updates = range(done + 1, self.updates + 1)
        own = pa.array([n for u in updates for n in own_samples(u, self.batch_size, rank, ranks)], pa.int64())
        return self.rows.take(own).append_column("sample", own)

    def batches(self, done: int, rank: int, ranks: int) -> Iterator[Columns]:
        """This rank's columns for each update after the first `done`, through Ray Data."""
        table = self.own_rows(done, rank, ranks)
        if table.num_rows == 0:
            return iter(())
        size = len(own_samples(1, self.batch_size, rank, ranks))
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        whole = ROWS_IN_BLOCK // size * size or size
        blocks = [table.slice(start, whole) for start in range(0, table.num_rows, whole)]
        dataset: ray.data.Dataset = ray.data.from_arrow(blocks)
        if self.read is not None:
            stage, arguments = self.read
            dataset = dataset.map_batches(
                stage, fn_constructor_kwargs=arguments, batch_size=size, num_cpus=0.5, concurrency=1
            )
        return iter(dataset.iter_batches(batch_size=size, batch_format="numpy", drop_last=False))


def sample_order(count: int, seed: int, updates: int, batch_size: int) -> list[int]:
    """Which of `count` items each global sample of a stage is, epoch after epoch; a function of the seed alone."""
    return [index for _, index in samples(count, seed, 0, updates * batch_size)]
