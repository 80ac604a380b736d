"""Steady time of an update under Ray Train against the same loop on plain torch.distributed, start-up excluded.

Both run the same updates of stage 1 on two CPU processes; under Ray with everything that a job does around them (Ray
Data, metrics, reports, journal, TensorBoard, watchdog), plain with nothing at all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from diagonal.config import Config
from diagonal.errors import require
from diagonal.jsonfile import write_json
from diagonal.model.dit import CausalWan
from diagonal.storage import Folder
from diagonal.training.batch_partition import own_samples
from diagonal.training.loop import Hooks, run_loop
from diagonal.training.state import TrainState
from jobs.distill import build, distill_feed, prompt_batch
from jobs.ray_cluster import connect
from jobs.runs.run import Run, main, say
from jobs.workers.data_feed import Feed
from jobs.workers.ray_train import fit_stage
from jobs.workers.reporting import RankInfo
from jobs.workers.watchdog import Watchdog
from jobs.workers.worker import Worker

T = TypeVar("T")
WARM_UP = 5  # updates that are not counted
NEVER = 10**9
STAMPS = "stamps.json"
KINDS, CLOCKS = ("plain", "Ray Train"), ("wall", "CPU")
Times = dict[str, float]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=20, help="counted updates of each measurement (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, in turns (default: 5)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", help="writes OUT as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    found = parser.parse_args(argv)
    for name in ("updates", "rounds", "workers"):
        require(getattr(found, name) >= 1, f"--{name}", getattr(found, name), "a whole number of at least 1")
    return found


def stamped(batches: Iterable[T], stamps: list[tuple[float, float]]) -> Iterator[T]:
    """The batches, and wall and CPU time when each was asked for.

    The time between two is a whole update with all that surrounds it; CPU time is that of all the process's threads.
    """
    source = iter(batches)
    while True:
        stamps.append((time.monotonic(), time.process_time()))
        yield next(source)


def typical(stamps: Sequence[Sequence[float]], clock: int, cycle: int) -> float:
    """Time of an update: over a cycle (the generator learns in one update of it), the mean of each place's median."""
    times = [after[clock] - before[clock] for before, after in zip(stamps, stamps[1:], strict=False)][WARM_UP:]
    return statistics.fmean(statistics.median(times[place::cycle]) for place in range(cycle))


def run_updates(worker: Worker, feed: Feed, plain: bool) -> None:
    """One rank's updates of stage 1; rank 0 writes its stamps."""
    text = worker.text()
    state, plan = build(worker, text)
    generator = state.networks["generator"]
    assert isinstance(generator, CausalWan)
    if plain:
        rows, hooks = plain_rows(worker, feed), Hooks(_no_report, _no_save)
    else:
        rows, hooks = worker.begin(state, feed, generator, text)
    stamps: list[tuple[float, float]] = []
    batches = stamped((prompt_batch(columns, text) for columns in rows), stamps)
    run_loop(state, replace(plan, checkpoint_every=NEVER, max_nonfinite=NEVER), batches, hooks)
    if worker.place.rank == 0:
        worker.run.folder.write_json(STAMPS, stamps)


def under_ray(worker: Worker, feed: Feed) -> None:
    """The body of the stage on Ray Train."""
    run_updates(worker, feed, plain=False)


def plain_rows(worker: Worker, feed: Feed) -> Iterator[dict[str, Any]]:
    """This rank's columns of each update, from a list."""
    rank, ranks = worker.place.rank, worker.place.world_size
    table = feed.own_rows(0, rank, ranks)
    size = len(own_samples(1, feed.batch_size, rank, ranks))
    yield from (table.slice(start, size).to_pydict() for start in range(0, table.num_rows, size))


def plain_rank(rank: int, settings: Mapping[str, Any], feed: Feed, meeting: str) -> None:
    """One process without Ray."""
    torch.set_num_threads(1)  # as Ray gives a worker of one CPU
    run = Run.from_settings(settings)
    ranks = run.config.train.workers
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    place = RankInfo("plain", rank, ranks)
    worker = Worker(run, place, torch.device("cpu"), Watchdog(NEVER, "plain"), on_ray=False)
    run_updates(worker, feed, plain=True)
    dist.destroy_process_group()


def _no_report(update: int, figures: Mapping[str, float]) -> None:
    """Nothing is reported."""


def _no_save(state: TrainState, *, wait: bool = False) -> None:
    """Nothing is saved: under Ray the one checkpoint comes after the last stamp."""


def seconds_per_update(run: Run, kind: str) -> Times:
    """Wall and CPU time of a typical update of one measurement."""
    feed = distill_feed(run)
    if kind == "Ray Train":
        fit_stage(run, "distill", under_ray, feed)
    else:
        meeting = str(run.folder.path / "meeting")
        processes.spawn(plain_rank, (run.to_settings(), feed, meeting), nprocs=run.config.train.workers)
    stamps, cycle = run.folder.read_json(STAMPS), run.config.distill.generator_every
    return {name: typical(stamps, clock, cycle) for clock, name in enumerate(CLOCKS)}


def measure(config: Config, rounds: int, storage: Path) -> dict[str, list[Times]]:
    """Seconds an update of both kinds; each round measures both, in an order that alternates."""
    found: dict[str, list[Times]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in sorted(found, reverse=number % 2 == 0):
            run = Run(f"{kind.split()[0]}-{number}", config, Folder(str(storage / f"{kind.split()[0]}-{number}")))
            run.folder.write_json("config.json", config.to_dict())
            found[kind].append(seconds_per_update(run, kind))
            shown = ", ".join(f"{name} {value:.4f} s" for name, value in found[kind][-1].items())
            say(f"round {number + 1}/{rounds}: {kind}: an update takes {shown}")
    return found


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    updates = options.updates + WARM_UP + 1
    config = Config.from_preset(
        "tiny",
        [
            f"train.workers={options.workers}",
            "train.gpus_per_worker=0",
            "train.sample_every=0",
            f"distill.stage1_updates={updates}",
            "distill.stage2_updates=0",
            *options.settings,
        ],
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    connect()  # before both, so that Ray's idle processes are there in both
    with tempfile.TemporaryDirectory(prefix="diagonal-overhead-") as storage:
        found = measure(config, options.rounds, Path(storage))
    say(
        f"{options.updates} updates of {config.distill.batch_size} samples on {options.workers} processes of one "
        f"thread, {os.cpu_count()} CPUs; medians of {options.rounds} rounds, in turns:"
    )
    ratios = {name: _compare(found, name) for name in CLOCKS}
    report = {
        "seconds_per_update": found,
        "ratios": ratios,
        "updates": options.updates,
        "workers": options.workers,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[1],
        "config": config.to_dict(),
    }
    if options.out:
        write_json(options.out, report)


def _compare(found: Mapping[str, Sequence[Times]], name: str) -> float:
    """Say the medians of one clock; returns the ratio, the median of the rounds'."""
    for kind in KINDS:
        values = [times[name] for times in found[kind]]
        say(f"  {kind}: {statistics.median(values):.4f} s {name} an update ({min(values):.4f} to {max(values):.4f})")
    pairs = zip(found["Ray Train"], found["plain"], strict=True)
    ratio = statistics.median(ray[name] / plain[name] for ray, plain in pairs)
    say(f"  Ray Train / plain, {name}: {ratio:.3f}")
    return ratio


if __name__ == "__main__":
    main("jobs.benchmarks.ray_train_overhead")
