"""The steps of stage 0 and of distillation over small networks, and batches that are functions of the sample number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diagonal.config import Config
from diagonal.model.attention import stage0_mask
from diagonal.training.batch_partition import own_samples
from diagonal.training.distill import DistillStep, Networks, PromptBatch
from diagonal.training.ema import Ema
from diagonal.training.loop import Learner
from diagonal.training.ode_init import OdeInitStep, PairBatch
from diagonal.training.parallel import ParallelPlan, device_mesh, parallelize
from tests.networks import CHANNELS, TEXT_DIM, TEXT_TOKENS, draw, small_causal, small_config, small_wan

PLAIN = ParallelPlan()


def stage_config(*settings: str) -> Config:
    """Seven samples, two at a time: three ranks have three, two and two of them, so two ranks pad."""
    both = (f"{stage}.{name}" for stage in ("ode_init", "distill") for name in ("batch_size=7", "micro_batch_size=2"))
    return small_config(*both, "distill.generator_every=1", "distill.ema_start=1", *settings)


def prepared(network: Any, ranks: int, trainable: bool = True) -> Any:
    return parallelize(network, network.blocks, device_mesh(ranks, "cpu"), PLAIN, trainable=trainable)


def learner(network: nn.Module, lr: float = 0.02) -> Learner:
    """With plain descent, so that weights show the gradient; the norm is never clipped."""
    return Learner(network, torch.optim.SGD(network.parameters(), lr=lr, momentum=0.5), 1e6)


def ode_step(config: Config, ranks: int) -> OdeInitStep:
    student = prepared(small_causal(1), ranks)
    return OdeInitStep(config, learner(student), Ema(student.named_parameters(), 0.5, 1), stage0_mask(config))


def distill_step(config: Config, ranks: int, stage: int = 2) -> DistillStep:
    generator, critic = prepared(small_causal(1), ranks), prepared(small_wan(2), ranks)
    teacher, reference = prepared(small_wan(3), ranks, False), prepared(small_causal(4), ranks, False)
    negative = draw(1, TEXT_TOKENS, TEXT_DIM, seed=99)
    networks = Networks(generator, critic, teacher, negative, reference if stage == 2 else None)
    ema = Ema(generator.named_parameters(), 0.5, 1)
    return DistillStep(config, stage, networks, learner(generator), learner(critic), ema, 0, 1000)


def text_of(samples: range) -> Tensor:
    return torch.stack([draw(TEXT_TOKENS, TEXT_DIM, seed=1000 + sample) for sample in samples])


def prompt_batch(config: Config, update: int, rank: int, ranks: int) -> PromptBatch:
    samples = own_samples(update, config.distill.batch_size, rank, ranks)
    return PromptBatch(text_of(samples), list(samples))


def pair_batch(config: Config, update: int, rank: int, ranks: int) -> PairBatch:
    samples, geometry = own_samples(update, config.ode_init.batch_size, rank, ranks), config.geometry
    size = (3, CHANNELS, geometry.clip_frames, geometry.latent_height, geometry.latent_width)
    states = torch.stack([draw(*size, seed=sample) for sample in samples])
    return PairBatch(states, torch.tensor([1.0, 0.5, 0.0]), text_of(samples), list(samples))
