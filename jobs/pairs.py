"""Stage 0 data: prompts to teacher trajectories on Ray Data; finished shards are kept, so a killed run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from diagonal.data.prompts import load_prompts, samples
from diagonal.data.stages import EncodeText, SolveTrajectory, WriteShard, shard_name, teacher_id
from diagonal.data.trajectory import read_shard
from diagonal.data.world import training_scenes
from diagonal.diffusion.noise import mixed_seed
from diagonal.errors import require
from diagonal.model.weights import file_hash
from diagonal.tree import write_json
from jobs.run import Run, connect, main, open_run, parser, say


def prompts_of(run: Run) -> list[str]:
    """The run's prompts: the configured file, or the embedded world's training captions."""
    uri = run.config.pairs.prompts
    require(bool(uri) or run.config.preset == "tiny", "pairs.prompts", uri, "a prompt file (only tiny has its own)")
    return load_prompts(uri) if uri else [scene.caption for scene in training_scenes()]


def plan_rows(run: Run, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Every sample of the finished set: its number, prompt, seed and shard. A function of the configuration alone."""
    pairs, seed = run.config.pairs, run.config.seed
    size = pairs.rows_per_shard
    return [
        {
            "sample": sample, "prompt": prompts[index], "seed": mixed_seed(seed, "pairs", sample),
            "shard": sample // size, "shard_rows": min(size, pairs.count - sample // size * size),
        }
        for sample, index in samples(len(prompts), seed, 0, pairs.count)
    ]


def is_done(folder: Path, shard: int) -> bool:
    """Whether that shard was finished: its file or the list of its rows set aside is there."""
    name = shard_name(shard)
    return (folder / f"{name}.parquet").exists() or (folder / "set_aside" / f"{name}.json").exists()


def make_pairs(run: Run) -> Path:
    """Solve and write the shards that are missing, then the manifest; returns the folder."""
    folder = (run.folder / "pairs").path
    if (folder / "manifest.json").exists():
        return folder
    rows = plan_rows(run, prompts_of(run))
    missing = [row for row in rows if not is_done(folder, row["shard"])]
    shards = len({row["shard"] for row in missing})
    size_gb = _trajectory_bytes(run) * len(rows) / 1e9
    say(f"pairs: {len(rows)} trajectories, {size_gb:.3f} GB; {len(missing)} to solve in {shards} shards")
    if missing:
        _solve(run, folder, missing, shards)
    _finish(run, folder, rows)
    return folder


def _trajectory_bytes(run: Run) -> int:
    """Bytes of one trajectory's states in bfloat16 (25 MB at 832x480)."""
    return 2 * len(run.config.pairs.kept_raw) * math.prod(run.config.geometry.clip_shape())


def _solve(run: Run, folder: Path, rows: list[dict[str, Any]], shards: int) -> None:
    """One block is one shard from reading to writing, as no stage cuts or merges blocks (batch_size=None)."""
    connect()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    gpus = run.config.train.gpus_per_worker
    arguments = {"config": run.config.to_dict(), "device": "cuda" if gpus else "cpu"}
    pool: dict[str, Any] = {"compute": ActorPoolStrategy(min_size=1, max_size=run.config.train.workers)}
    if gpus:
        pool["num_gpus"] = gpus
    dataset = ray.data.from_blocks(_blocks(rows))
    dataset = dataset.map_batches(
        EncodeText, fn_constructor_kwargs={**arguments, "device": "cpu"}, batch_size=None,
        compute=ActorPoolStrategy(min_size=1, max_size=1), num_cpus=1,
    )
    dataset = dataset.map_batches(SolveTrajectory, fn_constructor_kwargs=arguments, batch_size=None, num_cpus=1, **pool)
    dataset = dataset.map_batches(
        WriteShard, fn_constructor_kwargs={"folder": str(folder), "teacher_id": teacher_id(run.config)},
        batch_size=None, compute=ActorPoolStrategy(min_size=1, max_size=1), num_cpus=0.5,
    )
    started_s, done = time.monotonic(), 0
    for row in dataset.iter_rows():
        done += 1
        rate = done / (time.monotonic() - started_s)
        say(f"pairs: shard {row['shard']} done, {done}/{shards}, about {(shards - done) / rate:.0f} s left")


def _blocks(rows: list[dict[str, Any]]) -> list[Any]:
    import pandas as pd

    frame = pd.DataFrame(rows)
    return [block.reset_index(drop=True) for _, block in frame.groupby("shard", sort=True)]


def _finish(run: Run, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Check the share set aside and write the manifest, which makes the set finished."""
    files = sorted(folder.glob("pairs-*.parquet"))
    entries = [{"file": f.name, "rows": read_shard(f).num_rows, "sha256": file_hash(f)} for f in files]
    good = sum(entry["rows"] for entry in entries)
    share = 1.0 - good / len(rows)
    limit = run.config.pairs.max_bad_share
    require(share <= limit, "share of rows set aside", round(share, 4), f"at most pairs.max_bad_share = {limit}")
    write_json(folder / "manifest.json", {
        "format_version": 1, "rows": good, "set_aside": len(rows) - good, "shards": entries,
        "teacher_id": teacher_id(run.config), "config": run.config.to_dict(),
    })
    say(f"pairs: {good} trajectories in {folder}, {len(rows) - good} set aside")


def work(argv: Sequence[str]) -> None:
    make_pairs(open_run(parser(__doc__ or "").parse_args(argv)))


if __name__ == "__main__":
    main("jobs.pairs")
