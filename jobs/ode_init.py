"""Stage 0 training: the causal student learns the pairs' trajectories (Ray Train, FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diagonal.data.prompts import samples
from diagonal.data.stages import ReadPairs, read_manifest
from diagonal.data.trajectory import from_bits
from diagonal.model.text import TextEncoder
from diagonal.model.weights import check_transformer, load_causal
from diagonal.training.checkpoint import TrainState
from diagonal.training.ema import Ema
from diagonal.training.loop import Learner, OdeInitStep, Plan, run_loop
from diagonal.training.ode_init import PairBatch, stage0_mask
from diagonal.training.parallel import full_tensors, parallelize
from jobs.artefacts import base_lineage, write_student
from jobs.fit import Worker, check_batch, fit
from jobs.pairs import make_pairs
from jobs.run import Run, main, open_run, parser, say


def initialise(run: Run) -> None:
    """Train the run's initial student unless it has one."""
    if run.has_student("ode_init"):
        return
    settings = run.config.ode_init
    check_transformer(run.base, run.config)
    check_batch(settings.batch_size, run.config.train.workers, "ode_init.batch_size")
    pairs = make_pairs(run)
    places = [(entry["file"], i) for entry in read_manifest(pairs)["shards"] for i in range(entry["rows"])]
    rows = [
        {"sample": sample, "file": places[index][0], "index": places[index][1]}
        for sample, index in samples(len(places), run.config.seed, 0, settings.updates * settings.batch_size)
    ]
    fit(run, "ode_init", train, rows, read=(ReadPairs, {"folder": str(pairs)}))
    say(f"ode_init: student in {run.folder / 'ode_init'}")


def train(settings: dict[str, Any]) -> None:
    """One rank of stage 0."""
    worker = Worker.join(settings)
    config, options = worker.config, worker.config.ode_init
    student = load_causal(worker.run.base, config).to(worker.device)
    text = worker.text()
    parallelize(student, student.blocks, worker.mesh(), worker.plan, trainable=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=0.01)
    ema = Ema(student.named_parameters(), options.ema_decay, start_update=1)
    state = TrainState(0, {"generator": student}, {"generator": optimizer}, ema)
    worker.resume(state)
    step = OdeInitStep(config, Learner(student, optimizer, 10.0), ema, stage0_mask(config))
    plan = Plan(options.updates, options.checkpoint_every, options.batch_size, config.distill.max_nonfinite, step)
    batches = (pair_batch(rows, text, worker) for rows in worker.rows(state.samples_seen, options.batch_size))
    run_loop(state, plan, batches, worker.hooks(options.updates))
    weights = full_tensors(ema.shadow)
    if worker.rank == 0:
        lineage = {"parent": base_lineage(worker.run), "pairs": f"{worker.run.name}/pairs", "updates": state.update}
        write_student(worker.run, "ode_init", student.config, weights, lineage)


def pair_batch(rows: Mapping[str, Any], text: TextEncoder, worker: Worker) -> PairBatch:
    """The columns that Ray Data hands over as tensors on the worker's device."""
    return PairBatch(
        states=from_bits(rows["states_bf16"]).float().to(worker.device),
        levels=torch.tensor(rows["levels"][0], dtype=torch.float32, device=worker.device),
        text=text.encode([str(prompt) for prompt in rows["prompt"]]),
        samples=[int(sample) for sample in rows["sample"]],
    )


def work(argv: Sequence[str]) -> None:
    initialise(open_run(parser(__doc__ or "").parse_args(argv)))


if __name__ == "__main__":
    main("jobs.ode_init")
