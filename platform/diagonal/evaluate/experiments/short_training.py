"""Distillation in one process at a small budget, through training's own steps: what experiments compare."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diagonal.config import Config
from diagonal.data.prompts import samples
from diagonal.evaluate.quality.sources import own_world
from diagonal.jsonfile import read_json
from diagonal.model.base_model import LINEAGE, load_causal, load_codec, load_teacher, load_text, save_student
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.training.batch_partition import own_samples
from diagonal.training.distill import PromptBatch
from diagonal.training.loop import Hooks, run_loop
from diagonal.training.parallel import ParallelPlan
from diagonal.training.stage import build_stage, enter_stage2
from diagonal.training.state import TrainState

SAID_EVERY = 50


def trained_student(
    config: Config, base: Path, init: Path, folder: Path, say: Callable[[str], None] = print
) -> Mapping[str, object]:
    """Stages 1 and 2 of a configuration from the student in `init` under the teacher in `base`; the averaged student is
    written to `folder`, unless it is there already. Returns its lineage, with the CPU-seconds that it took."""
    if not (folder / LINEAGE).is_file():
        began_s = time.process_time()
        state, generator = _train(config, base, init, say)
        assert state.ema is not None
        lineage = {
            "stage": "stage2",
            "seed": config.seed,
            "updates": state.update,
            "weights": "ema",
            "cpu_s": round(time.process_time() - began_s, 1),
        }
        save_student(folder, config, generator.config, state.ema.shadow, lineage)
    found: Mapping[str, object] = read_json(folder / LINEAGE)
    return found


def _train(config: Config, base: Path, init: Path, say: Callable[[str], None]) -> tuple[TrainState, CausalWan]:
    options, text = config.distill, load_text(base, config)

    def load(role: str) -> Any:
        if role == "codec":
            return load_codec(base, config)
        return load_causal(init, config) if role == "generator" else load_teacher(base, config)

    negative = text.encode([config.model.negative_prompt])
    state, plan = build_stage(config, 1, "cpu", load, negative=negative, parallel=ParallelPlan())
    generator, last = state.networks["generator"], options.stage1_updates + options.stage2_updates
    assert isinstance(generator, CausalWan)
    batches, hooks = _batches(config, text, last), Hooks(_reporter(say, last), _keep_nothing)
    run_loop(state, replace(plan, checkpoint_every=last + 1), batches, hooks)
    plan = enter_stage2(config, state, plan, copy.deepcopy(generator).requires_grad_(False))
    run_loop(state, replace(plan, checkpoint_every=last + 1), batches, hooks)
    return state, generator


def _batches(config: Config, text: TextEncoder, updates: int) -> Iterator[PromptBatch]:
    world, size = own_world(config), config.distill.batch_size
    held_out = set(world.captions(held_out=True))
    known = [caption for caption in world.captions() if caption not in held_out]
    order = [index for _, index in samples(len(known), config.seed, 0, updates * size)]
    for update in range(1, updates + 1):
        own = own_samples(update, size, 0, 1)
        yield PromptBatch(text.encode([known[order[sample]] for sample in own]), list(own))


def _reporter(say: Callable[[str], None], last: int) -> Callable[[int, Mapping[str, float]], None]:
    def report(update: int, figures: Mapping[str, float]) -> None:
        if update % SAID_EVERY == 0 or update == last:
            say(f"update {update} of {last}: critic {figures['critic']:.4f}")

    return report


def _keep_nothing(state: TrainState, *, wait: bool = False) -> None:
    """A run this short begins again when it was cut off."""
