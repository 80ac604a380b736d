"""Pairs a second of the pairs job against the same stages in a plain loop, start-up excluded, on the embedded model."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

from diagonal.config import Config
from diagonal.data.pair_set import PairPlan, begin, shard_file
from diagonal.data.stages import EncodeText, SolveShard
from diagonal.errors import require
from diagonal.storage import Folder
from jobs.pairs import plan_of, solve_shards
from jobs.runs.prompts import pair_prompts_folder
from jobs.runs.run import Run, connect, main, say


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=9, help="shards of each measurement; the first is not counted")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turns")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    found = parser.parse_args(argv)
    require(found.shards >= 2, "--shards", found.shards, "a whole number of at least 2")
    require(found.rounds >= 1, "--rounds", found.rounds, "a whole number of at least 1")
    return found


def plain_loop(run: Run, plan: PairPlan, folder: Folder) -> None:
    """The same stages in this process, one shard after the other."""
    encode, solve = EncodeText(plan, pair_prompts_folder(run)), SolveShard(plan, folder)
    for shard in plan.shards:
        solve(encode({"shard": np.array([shard])}))


def under_ray(run: Run, plan: PairPlan, folder: Folder) -> None:
    """The job's own pipeline: one actor that encodes, one that solves and writes, of one thread each."""
    for _ in solve_shards(run, folder, plan, plan.shards):
        pass


def rate(plan: PairPlan, folder: Folder) -> float:
    """Pairs a second between the first file and the last: what comes before the first is start-up."""
    written_s = sorted((folder.path / shard_file(shard)).stat().st_mtime_ns / 1e9 for shard in plan.shards)
    return (len(plan.shards) - 1) * plan.config.pairs.rows_per_shard / (written_s[-1] - written_s[0])


def measure(run: Run, rounds: int) -> dict[str, list[float]]:
    """Rates of both kinds; each round measures both, in an order that alternates."""
    plan, kinds = plan_of(run), {"plain loop": plain_loop, "Ray Data": under_ray}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name in sorted(kinds, reverse=number % 2 == 0):
            folder = run.folder / f"round-{number}-{name.split()[0]}"
            begin(folder, plan)
            kinds[name](run, plan, folder)
            found[name].append(rate(plan, folder))
            say(f"round {number + 1}/{rounds}: {name} {found[name][-1]:.2f} pairs/s")
            folder.delete()
    return found


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    torch.set_num_threads(1)  # as Ray gives an actor of one CPU
    config = Config.from_preset("tiny", ["train.workers=1", "train.gpus_per_worker=0", *options.settings])
    pairs = dataclasses.replace(config.pairs, count=options.shards * config.pairs.rows_per_shard)
    with tempfile.TemporaryDirectory(prefix="diagonal-rate-") as storage:
        run = Run("rate", dataclasses.replace(config, pairs=pairs), Folder(storage))
        connect()  # before both, so that Ray's idle processes are there in both
        found = measure(run, options.rounds)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    say(
        f"{options.shards - 1} shards of {pairs.rows_per_shard} pairs, {pairs.solver_steps} steps, one thread a "
        f"process, {os.cpu_count()} CPUs; medians of {options.rounds}, in turns:"
    )
    for name, median in medians.items():
        say(f"  {name}: {median:.2f} pairs/s ({min(found[name]):.2f} to {max(found[name]):.2f})")
    say(f"  Ray Data / plain loop: {medians['Ray Data'] / medians['plain loop']:.3f}")


if __name__ == "__main__":
    main("jobs.benchmarks.ray_data_overhead")
