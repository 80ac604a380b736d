"""Stage 0 data: prompts to teacher trajectories on Ray Data; finished shards are kept, so a killed run goes on.

The trajectories are always of the base model's own teacher (docs/method.md, ode-init);
distill.teacher gives the real score alone.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

import json
import math
import re
import time
from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from diagonal.data.pair_set import (
    MANIFEST,
    USABLE,
    PairPlan,
    Shard,
    begin,
    finish,
    finished,
    keep_usable,
    usable_places,
    verify,
)
from diagonal.data.stages import EncodeText, SolveShard, teacher_id
from diagonal.errors import require
from diagonal.metrics import MetricsBackend
from diagonal.model.base_model import check_transformer
from diagonal.storage import Folder
from jobs.ray_metrics import ray_metrics
from jobs.runs.plan import run_job
from jobs.runs.prompts import pair_prompts, pair_prompts_folder, prompts_sha256
from jobs.runs.run import JobFailed, Run, connect, say
from jobs.workers.cluster_room import pairs_needs, wait_for_room

ERROR = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception): .*)$", re.MULTILINE)
SEEN_WITHIN_S = 60.0  # network file systems show a new file late


def plan_of(run: Run) -> PairPlan:
    """What decides the run's pairs; prepares its prompts, and checks the teacher."""
    check_transformer(run.base, run.config)
    folder = pair_prompts_folder(run)
    return PairPlan(run.config, len(pair_prompts(run)), prompts_sha256(folder), teacher_id(run.config))


def make_pairs(run: Run) -> Folder:
    """Solve and write the shards that are missing, then the manifest; returns the folder."""
    folder = run.folder / "pairs"
    if folder.has(MANIFEST):
        return folder
    plan = plan_of(run)
    begin(folder, plan)
    shards = finished(folder, plan)
    missing = [number for number in plan.shards if number not in shards]
    size_gb = _trajectory_bytes(run) * run.config.pairs.count / 1e9
    say(
        f"pairs: {run.config.pairs.count} trajectories, {size_gb:.3f} GB, in {len(plan.shards)} shards of which "
        f"{len(missing)} are to be made"
    )
    plan.check_bad([row for shard in shards.values() for row in shard.quarantined])
    for shard in solve_shards(run, folder, plan, missing):
        shards[shard.number] = shard
        plan.check_bad([row for found in shards.values() for row in found.quarantined])
    manifest = finish(folder, plan, [shards[number] for number in plan.shards])
    say(f"pairs: {manifest['rows']} trajectories in {folder}, {len(manifest['quarantined'])} quarantined")
    return folder


def usable_pairs(run: Run) -> list[tuple[str, int]]:
    """(file, row in it) of every pair to train on, in one order for all ranks and resumes; makes and verifies the set.

    All rows are read once before the first training; those that are corrupt are left out, and named in
    `pairs/usable.json`. Past pairs.max_bad_share this is a `FieldError`.
    """
    folder = make_pairs(run)
    if not folder.has(USABLE):
        bad = verify(folder)
        for row in bad:
            say(f"pairs: {row['file']}, row {row['index']} (sample {row['sample']}) quarantined: {row['reason']}")
        if bad:
            connect()  # a number told before is told nobody
            _count_bad(ray_metrics(), "ode_init", bad)
        keep_usable(folder, plan_of(run), bad)
    return usable_places(folder)


def _count_bad(metrics: MetricsBackend, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for reason, count in Tally(row["reason"] for row in rows).items():
        metrics.inc("diagonal_data_quarantined_total", count, stage=stage, reason=reason)


def _trajectory_bytes(run: Run) -> int:
    """Bytes of one trajectory's states in bfloat16 (25 MB at 832x480)."""
    return 2 * len(run.config.pairs.kept_raw) * math.prod(run.config.geometry.clip_shape())


def solve_shards(run: Run, folder: Folder, plan: PairPlan, missing: Sequence[int]) -> Iterator[Shard]:
    """Each missing shard when it is written, through a pool that encodes text and one that solves and writes.

    A row of the data set is a shard's number and its prompts' embeddings: trajectories stay in the process that solves
    them. An actor that is lost is replaced and its shard solved again, train.max_failures times.
    """
    if not missing:
        return
    connect()
    wait_for_room(pairs_needs(run.config), run.config.train.nodes_wait_s)
    config, gpus = run.config, run.config.train.gpus_per_worker
    dataset = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
    arguments = {"plan": plan, "prompts": pair_prompts_folder(run)}
    dataset = _mapped(dataset, run, EncodeText, arguments, config.pairs.text_workers)
    arguments = {"plan": plan, "folder": folder, "device": "cuda" if gpus else "cpu"}
    workers = config.pairs.solver_workers or config.train.workers
    place: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
    if config.train.pool:
        place["label_selector"] = {"pool": config.train.pool}
    dataset = _mapped(dataset, run, SolveShard, arguments, workers, **place)
    progress = _Progress(ray_metrics(), len(missing), sum(len(plan.samples(number)) for number in missing))
    try:
        for row in dataset.iter_rows():
            aside = json.loads(row["quarantined"])
            shard = Shard(row["shard"], row["rows"], row["bytes"], row["checksum"], tuple(aside))
            check_seen(folder, shard)
            progress(shard, row["encode_s"], row["solve_s"])
            yield shard
    except RayError as error:
        raise JobFailed(f"pairs failed: {_cause(str(error))}\nfinished shards are kept; {run.resume_hint}") from None


def _cause(account: str) -> str:
    """The error that ended an actor, in Ray's account of it; all of it where no error is named (a process was lost)."""
    named = [found for found in ERROR.findall(account) if not found.startswith("UserCodeException")]
    return named[-1] if named else account.strip()


def _mapped(dataset: Any, run: Run, stage: type, arguments: dict[str, Any], workers: int, **resources: Any) -> Any:
    """One call of the stage for each row, on a pool of up to `workers` actors of one CPU each."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    retries = run.config.train.max_failures  # so Ray 2.60 takes restarts of actors; without, they have no end
    return dataset.map_batches(
        stage,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        num_cpus=1,
        max_restarts=retries,
        max_task_retries=retries,
        compute=ActorPoolStrategy(min_size=1, max_size=workers),
        **resources,
    )


def check_seen(folder: Folder, shard: Shard, within_s: float = SEEN_WITHIN_S) -> None:
    """`FieldError` when a shard that an actor wrote is not in the driver's folder: the node's disk is its own."""
    until_s = time.monotonic() + within_s
    while shard.rows and not folder.has(shard.file):
        require(
            time.monotonic() < until_s,
            "train.storage",
            str(folder),
            f"a folder that every node of the cluster sees: a node wrote {shard.file} to one of its own",
        )
        time.sleep(0.5)


class _Progress:
    """Counts shards in the metrics and says how far the job is."""

    def __init__(self, metrics: MetricsBackend, shards: int, rows: int) -> None:
        self._metrics, self._missing = metrics, rows
        self._started_s, self._shards, self._done, self._rows = time.monotonic(), shards, 0, 0
        metrics.set("diagonal_pairs_missing", rows)

    def __call__(self, shard: Shard, encode_s: float, solve_s: float) -> None:
        self._done += 1
        self._rows += shard.rows
        self._missing -= shard.rows + len(shard.quarantined)
        seconds = time.monotonic() - self._started_s
        self._metrics.inc("diagonal_pairs_total", shard.rows)
        self._metrics.set("diagonal_pairs_per_second", self._rows / seconds)
        self._metrics.set("diagonal_pairs_missing", self._missing)
        self._metrics.observe("diagonal_pairs_shard_seconds", encode_s, step="encode")
        self._metrics.observe("diagonal_pairs_shard_seconds", solve_s, step="solve")
        _count_bad(self._metrics, "pairs", shard.quarantined)
        aside = f" ({len(shard.quarantined)} rows quarantined)" if shard.quarantined else ""
        left_s = (self._shards - self._done) * seconds / self._done
        say(
            f"pairs: shard {shard.number} done{aside}, {self._done}/{self._shards}, "
            f"{self._rows / seconds:.2f} pairs/s, about {left_s:.0f} s left"
        )


def work(argv: Sequence[str]) -> None:
    run_job(argv, __doc__ or "", "pairs", lambda run: say(f"pairs {make_pairs(run)}"))
