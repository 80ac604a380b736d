"""Stage 0 training: the causal student learns the pairs' trajectories (Ray Train, FSDP2)."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch

from diagonal.data.stages import ReadPairs
from diagonal.data.trajectory import from_bits
from diagonal.model.base_model import check_transformer, load_causal
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.training.loop import run_loop
from diagonal.training.ode_init import PairBatch
from diagonal.training.parallel import full_tensors
from jobs.pairs import usable_pairs
from jobs.runs.artefacts import base_lineage, write_student
from jobs.runs.plan import run_job
from jobs.runs.prompts import pair_prompts
from jobs.runs.run import Run, say
from jobs.workers.data_feed import Feed, sample_order
from jobs.workers.ray_train import check_batch, fit_stage
from jobs.workers.samples import sample_captions
from jobs.workers.worker import Worker


def initialise(run: Run) -> None:
    """Train the run's initial student unless it has one."""
    if run.has_student("ode_init"):
        return
    settings = run.config.ode_init
    check_transformer(run.base, run.config)
    check_batch(settings.batch_size, run.config.train.workers, "ode_init.batch_size")
    places = usable_pairs(run)
    order = sample_order(len(places), run.config.seed, settings.updates, settings.batch_size)
    rows = pa.table({"file": [places[item][0] for item in order], "index": [places[item][1] for item in order]})
    read = (ReadPairs, {"folder": run.folder / "pairs"})
    captions = sample_captions(run.config, pair_prompts(run))
    feed = Feed(rows, settings.batch_size, settings.updates, read, captions)
    fit_stage(run, "ode_init", train, feed)
    say(f"ode_init: student in {run.folder / 'ode_init'}")


def train(worker: Worker, feed: Feed) -> None:
    """One rank of stage 0."""
    run, text = worker.run, worker.text()
    state, plan = worker.build_stage(0, lambda _: load_causal(run.base, worker.config))
    student = state.networks["generator"]
    assert isinstance(student, CausalWan) and state.ema is not None
    rows, hooks = worker.begin(state, feed, student, text)
    run_loop(state, plan, (pair_batch(columns, text, worker) for columns in rows), hooks)
    weights = full_tensors(state.ema.shadow)
    if worker.place.rank == 0:
        lineage = {"parent": base_lineage(run), "pairs": f"{run.name}/pairs", "updates": state.update}
        write_student(run, "ode_init", student.config, weights, lineage)


def pair_batch(rows: Mapping[str, Any], text: TextEncoder, worker: Worker) -> PairBatch:
    """The columns that Ray Data hands over as tensors on the worker's device."""
    return PairBatch(
        states=from_bits(rows["states_bf16"]).float().to(worker.device),
        levels=torch.tensor(rows["levels"][0], dtype=torch.float32, device=worker.device),
        text=text.encode([str(prompt) for prompt in rows["prompt"]]),
        samples=[int(sample) for sample in rows["sample"]],
    )


def work(argv: Sequence[str]) -> None:
    run_job(argv, __doc__ or "", "ode_init", initialise)
