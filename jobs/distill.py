"""Distillation: stages 1 and 2 on Ray Train with FSDP2, after whatever earlier stage is missing, then the release."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from diagonal.errors import require
from diagonal.model.base_model import check_transformer, load_causal, load_codec, load_teacher
from diagonal.model.dit import CausalWan
from diagonal.model.import_checkpoints import load_initial_student
from diagonal.model.text import TextEncoder
from diagonal.storage import Folder
from diagonal.storage.fetch import STUDENT_FILES, fetch
from diagonal.training.checkpoint import Checkpointer
from diagonal.training.distill import PromptBatch
from diagonal.training.distributed import is_grouped
from diagonal.training.loop import Plan, run_loop
from diagonal.training.parallel import ParallelPlan, full_state_dict, full_tensors, parallelize
from diagonal.training.stage import enter_stage2
from diagonal.training.state import TrainState
from jobs.export import export
from jobs.ode_init import initialise
from jobs.pretrain import pretrain
from jobs.runs.artefacts import (
    STAGE1_STATE,
    base_lineage,
    inherited_state,
    initial_student,
    lineage_of,
    local_copy,
    write_student,
)
from jobs.runs.plan import run_job
from jobs.runs.prompts import training_prompts
from jobs.runs.run import Run, say
from jobs.runs.summary import summarise
from jobs.workers.data_feed import Feed, sample_order
from jobs.workers.ray_train import check_batch, fit_stage
from jobs.workers.samples import sample_captions
from jobs.workers.worker import Worker


def distill(run: Run) -> Folder:
    """Run every stage that is missing, up to the release; returns the release's folder."""
    if run.is_finished:
        say(f"run {run.name} is finished already: nothing is left to do")
        return run.folder / "release"
    if run.from_scratch:
        pretrain(run)
    if run.makes_student:
        initialise(run)
    if not run.has_student("stage2"):
        _fit(run)
    release = export(run)
    summarise(run)
    return release


def teacher_folder(run: Run) -> Path:
    """The network that gives the real score: a local folder that holds `transformer/`."""
    given = run.config.distill.teacher
    return fetch(given, patterns=STUDENT_FILES) if given else run.base


def distill_feed(run: Run) -> Feed:
    """What stages 1 and 2 learn from: prompts alone."""
    options = run.config.distill
    prompts = training_prompts(run)
    updates = options.stage1_updates + options.stage2_updates
    found = prompts.take(sample_order(len(prompts), run.config.seed, updates, options.batch_size))
    rows = pa.table({"prompt": pa.array([prompt for _, prompt in found], pa.string())})
    return Feed(rows, options.batch_size, updates, captions=sample_captions(run.config, prompts))


def _fit(run: Run) -> None:
    student = initial_student(run)
    for folder in (run.base, teacher_folder(run), *([student] if student.is_dir() else [])):
        check_transformer(folder, run.config)
    check_batch(run.config.distill.batch_size, run.config.train.workers, "distill.batch_size")
    fit_stage(run, "distill", train, distill_feed(run))
    say(f"distill: student in {run.folder / 'stage2'}")


def train(worker: Worker, feed: Feed) -> None:
    """One rank of stages 1 and 2."""
    text = worker.text()
    state, plan = build(worker, text)
    generator = state.networks["generator"]
    assert isinstance(generator, CausalWan) and state.ema is not None
    rows, hooks = worker.begin(state, feed, generator, text, inherited_state(worker.run))
    first, least = worker.config.distill.stage1_updates, f"at least {state.update}, as what distill.init names had"
    require(state.stage == 2 or state.update <= first, "distill.stage1_updates", first, least)
    batches = (prompt_batch(columns, text) for columns in rows)
    run_loop(state, plan, batches, hooks)
    keep_stage1(worker, state)
    run_loop(state, enter_stage2(worker.config, state, plan, read_reference(worker)), batches, hooks)
    weights = full_tensors(state.ema.shadow)
    if worker.place.rank == 0:
        lineage = {"parent": f"{worker.run.name}/stage1", "updates": state.update, "weights": "ema"}
        write_student(worker.run, "stage2", generator.config, weights, {**lineage, **teacher_lineage(worker.run)})


def build(worker: Worker, text: TextEncoder) -> tuple[TrainState, Plan[PromptBatch]]:
    """Stage 1's beginning: the student, a critic of the base model's weights, and the teacher."""
    run, config = worker.run, worker.config

    def load(role: str) -> Any:
        if role == "generator":
            return load_initial_student(initial_student(run), run.base, config)
        if role == "codec":
            return load_codec(run.base, config).to(worker.device)
        return load_teacher(run.base if role == "critic" else teacher_folder(run), config)

    return worker.build_stage(1, load, text.encode([config.model.negative_prompt]))


def keep_stage1(worker: Worker, state: TrainState) -> None:
    """Write the generator as stage 1 left it, once: stage 2's regression reference, on a resume too. Beside it all else
    that stage 2 inherits, in float32, so that another run may begin from there."""
    if worker.run.has_student("stage1"):
        return
    Checkpointer(worker.run.folder / STAGE1_STATE, keep=1).save(state, wait=True)
    generator = state.networks["generator"]
    assert isinstance(generator, CausalWan)
    weights = full_state_dict(generator)
    if worker.place.rank == 0:
        lineage = {"parent": lineage_of(worker.run.initial_student), "updates": worker.config.distill.stage1_updates}
        lineage |= {"weights": "generator", **teacher_lineage(worker.run)}
        write_student(worker.run, "stage1", generator.config, weights, lineage)


def read_reference(worker: Worker) -> CausalWan:
    """Stage 1's generator, frozen; every rank reads it from its file."""
    if is_grouped():
        torch.distributed.barrier()
    reference = load_causal(local_copy(worker.run, "stage1"), worker.config).to(worker.device)
    plan = ParallelPlan.of(worker.config)
    return parallelize(reference, reference.blocks, worker.mesh(), plan, trainable=False)


def teacher_lineage(run: Run) -> dict[str, str]:
    """How lineage names the network that gave the real score."""
    return {"teacher": lineage_of(run.config.distill.teacher) if run.config.distill.teacher else base_lineage(run)}


def prompt_batch(rows: Mapping[str, Any], text: TextEncoder) -> PromptBatch:
    """The columns that Ray Data hands over, encoded on the worker's device."""
    embeddings = text.encode([str(prompt) for prompt in rows["prompt"]])
    return PromptBatch(embeddings, [int(sample) for sample in rows["sample"]])


def work(argv: Sequence[str]) -> None:
    run_job(argv, __doc__ or "", "release", lambda run: say(f"release {distill(run)}"))
