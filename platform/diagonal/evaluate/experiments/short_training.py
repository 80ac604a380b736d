"""Distillation in one process at a small budget, through training's own steps: what experiments compare."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from diagonal.config import Config
from diagonal.data.prompts import samples
from diagonal.evaluate.quality.sources import own_world
from diagonal.jsonfile import read_json
from diagonal.model.base_model import LINEAGE, load_causal, load_teacher, load_text, save_student
from diagonal.model.text import TextEncoder
from diagonal.training.batch_partition import own_samples
from diagonal.training.distill import Networks, PromptBatch
from diagonal.training.loop import Hooks, Plan, distill_state, distill_step, run_loop
from diagonal.training.state import TrainState

SAID_EVERY = 50


def trained_student(
    config: Config, base: Path, init: Path, folder: Path, say: Callable[[str], None] = print
) -> Mapping[str, object]:
    """Stages 1 and 2 of a configuration from the student in `init` under the teacher in `base`; the averaged student is
    written to `folder`, unless it is there already. Returns its lineage, with the CPU-seconds that it took."""
    if not (folder / LINEAGE).is_file():
        began_s = time.process_time()
        state, networks = _train(config, base, init, say)
        assert state.ema is not None
        lineage = {
            "stage": "stage2",
            "seed": config.seed,
            "updates": state.update,
            "weights": "ema",
            "cpu_s": round(time.process_time() - began_s, 1),
        }
        save_student(folder, config, networks.generator.config, state.ema.shadow, lineage)
    found: Mapping[str, object] = read_json(folder / LINEAGE)
    return found


def _train(config: Config, base: Path, init: Path, say: Callable[[str], None]) -> tuple[TrainState, Networks]:
    options, text = config.distill, load_text(base, config)
    generator, critic = load_causal(init, config), load_teacher(base, config).requires_grad_(True)
    networks = Networks(generator, critic, load_teacher(base, config), text.encode([config.model.negative_prompt]))
    state = distill_state(config, generator, critic)
    last = options.stage1_updates + options.stage2_updates
    batches = _batches(config, text, last)
    for stage, until in ((1, options.stage1_updates), (2, last)):
        if stage == 2:  # what stage 1 came to is the reference, as jobs/distill.py has it
            networks = replace(networks, reference=copy.deepcopy(generator).requires_grad_(False))
        state.stage = stage
        step = distill_step(config, stage, state, networks)
        run_loop(
            state,
            Plan(until, last + 1, options.batch_size, options.max_nonfinite, step),
            batches,
            Hooks(_reporter(say, last), _keep_nothing),
        )
    return state, networks


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
