"""A training stage, built once for jobs, experiments and measurements: its state, and the plan of its loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diagonal.config import Config
from diagonal.model.attention import stage0_mask
from diagonal.model.dit import CausalWan
from diagonal.training.distill import DistillStep, Networks, PromptBatch
from diagonal.training.ema import Ema
from diagonal.training.loop import Learner, Plan
from diagonal.training.ode_init import OdeInitStep, PairBatch, state_weights
from diagonal.training.parallel import ParallelPlan, parallelize
from diagonal.training.state import TrainState

CLIP_NORM = 10.0  # of stage 0
Load = Callable[[str], Any]  # a network of one of the roles generator, critic, teacher, reference; or the codec


def build_stage(
    config: Config,
    stage: int,
    device: torch.device | str,
    load: Load,
    *,
    negative: Tensor | None = None,
    mesh: DeviceMesh | None = None,
    parallel: ParallelPlan | None = None,
) -> tuple[TrainState, Plan[Any]]:
    """What a stage begins with: networks, optimizers and average; and the plan that `run_loop` follows.

    `load(role)` gives each network, which is moved to `device` and parallelized as the configuration says, or as
    `parallel` does. `negative` is the embedding `[1, l, n]` of the negative prompt; stage 0 needs none.
    """

    def network(role: str, *, trainable: bool) -> Any:
        loaded = load(role).to(device)
        return parallelize(loaded, loaded.blocks, mesh, parallel or ParallelPlan.of(config), trainable=trainable)

    generator = network("generator", trainable=True)
    if stage == 0:
        return _ode_init(config, generator)
    critic, teacher = network("critic", trainable=True), network("teacher", trainable=False)
    assert negative is not None
    state = _distill_state(config, stage, generator, critic)
    longer = config.distill.rollout_chunks > config.geometry.clip_chunks
    networks = Networks(generator, critic, teacher, negative, codec=load("codec") if longer else None)
    plan = _distill_plan(config, 1, state, networks)
    return state, plan if stage == 1 else enter_stage2(config, state, plan, network("reference", trainable=False))


def enter_stage2(config: Config, state: TrainState, plan: Plan[PromptBatch], reference: CausalWan) -> Plan[PromptBatch]:
    """Stage 2 with the networks of stage 1's plan; `reference` is the frozen generator that stage 1 ended with."""
    assert isinstance(plan.step, DistillStep)
    state.stage = 2
    return _distill_plan(config, 2, state, replace(plan.step.networks, reference=reference))


def _ode_init(config: Config, student: Any) -> tuple[TrainState, Plan[PairBatch]]:
    options = config.ode_init
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=0.01)
    ema = Ema(student.named_parameters(), options.ema_decay, start_update=1)
    states = state_weights(config) if options.states == "schedule" else None
    step = OdeInitStep(config, Learner(student, optimizer, CLIP_NORM), ema, stage0_mask(config), states)
    plan = Plan(options.updates, options.checkpoint_every, options.batch_size, config.distill.max_nonfinite, step)
    state = TrainState(0, {"generator": student}, {"generator": optimizer}, ema)
    return state, replace(plan, sample_tokens=_sample_tokens(config))


def _distill_state(config: Config, stage: int, generator: Any, critic: Any) -> TrainState:
    options = config.distill
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(
            network.parameters(), lr=lr, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay
        )
        for name, network, lr in (("generator", generator, options.lr), ("critic", critic, options.critic_lr))
    }
    ema = Ema(generator.named_parameters(), options.ema_decay, options.ema_start)
    return TrainState(stage, {"generator": generator, "critic": critic}, optimizers, ema)


def _distill_plan(config: Config, stage: int, state: TrainState, networks: Networks) -> Plan[PromptBatch]:
    options = config.distill
    assert state.ema is not None
    generator, critic = (
        Learner(state.networks[name], state.optimizers[name], options.clip_norm) for name in ("generator", "critic")
    )
    first = options.stage1_updates if stage == 2 else 0
    last = first + options.stage2_updates if stage == 2 else options.stage1_updates
    step = DistillStep(config, stage, networks, generator, critic, state.ema, first, last)
    plan = Plan(last, options.checkpoint_every, options.batch_size, options.max_nonfinite, step)
    return replace(plan, sample_tokens=_sample_tokens(config))


def _sample_tokens(config: Config) -> int:
    return config.geometry.clip_chunks * config.geometry.chunk_tokens
