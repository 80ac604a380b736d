"""Stages 1 and 2: distribution matching on the generator's own rollouts, with a critic that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion.flow import blend, to_clean
from diagonal.diffusion.noise import Salt, generator, mixed_seed
from diagonal.diffusion.rollout import RollOptions, draw_exit_steps, rollout
from diagonal.diffusion.teacher import guided_clean, velocity
from diagonal.errors import require
from diagonal.model.dit import CausalWan
from diagonal.model.vae import LinearCodec, decoder_of, encode_clips
from diagonal.schedule import StepSchedule
from diagonal.training import losses
from diagonal.training.ema import Ema
from diagonal.training.loop import Figures, Learner, Terms, falling_rate, micro_batched
from diagonal.training.parallel import rollout_scope


@dataclass(frozen=True)
class PromptBatch:
    """Embeddings `[b, l, n]` of prompts, and the global sample numbers that seed their rollouts and draws."""

    text: Tensor
    samples: Sequence[int]

    def part(self, where: slice) -> PromptBatch:
        """Some of its samples."""
        return PromptBatch(self.text[where], self.samples[where])


@dataclass(frozen=True)
class Networks:
    """The networks of one stage on one rank. `reference` is the generator frozen at the start of stage 2, or None;
    `negative` is the embedding `[1, l, n]` of the negative prompt; `codec` is what rollouts longer than a clip need."""

    generator: CausalWan
    critic: WanTransformer3DModel
    teacher: WanTransformer3DModel
    negative: Tensor
    reference: CausalWan | None = None
    codec: AutoencoderKLWan | LinearCodec | None = None


def stage_schedule(config: Config, stage: int) -> StepSchedule:
    """The schedule of a stage: uniform steps in stage 1, the configured diagonal in stage 2; one context for both."""
    require(stage in (1, 2), "stage", stage, "1 or 2")
    own = config.schedule
    return own if stage == 2 else own.with_steps(config.distill.stage1_steps)


def generator_loss(
    networks: Networks, config: Config, batch: PromptBatch, update: int, stage: int
) -> tuple[Tensor, Terms]:
    """Total loss (docs/method.md, distribution matching) of rollouts with gradient at exit steps, and its terms."""
    x = _rollout(networks, config, batch, update, stage, "generator")
    fake, real = _score(networks, config, batch, x)
    weights = config.distill.loss
    by_frame = losses.motion_frame_weights(x, fake, real) if weights.motion_weights else None
    terms = {"dmd": losses.dmd(x, fake, real), "motion": losses.motion(x, fake, real, by_frame)}
    if networks.reference is not None and weights.follows_reference:
        target = _reference(networks, config, batch, update)
        terms["flow_regression"] = losses.flow_regression(x, target)
        terms["regression"] = losses.regression(x, target)
    total = losses.generator_total(weights, **terms)
    return total, {name: term.detach() for name, term in {**terms, "generator": total}.items()}


def critic_loss(
    networks: Networks, config: Config, batch: PromptBatch, update: int, stage: int
) -> tuple[Tensor, Terms]:
    """Flow matching of the critic on rollouts of their own, drawn by the same rule as the generator's; its one term."""
    with torch.no_grad():
        x = _rollout(networks, config, batch, update, stage, "critic")
    level, noise = _score_draws(config, batch, x, "critic")
    predicted = velocity(networks.critic, blend(x, noise, level), level, batch.text)
    loss = losses.critic_flow(predicted, noise, x)
    return loss, {"critic": loss.detach()}


def _rollout(networks: Networks, config: Config, batch: PromptBatch, update: int, stage: int, role: str) -> Tensor:
    """Scored clips `[b, c, f, h, w]` of the generator, with gradient at exit steps."""
    schedule, chunks = stage_schedule(config, stage), rollout_chunks(config, role, update)
    scored = range(chunks - config.geometry.clip_chunks, chunks)
    exits = [draw_exit_steps(schedule, scored, config.seed, role, sample) for sample in batch.samples]
    seeds, options = _seeds(config, batch, role), RollOptions(schedule=schedule, chunks=chunks, exit_steps=exits)
    return _scored(networks, config, rollout(networks.generator, config, batch.text, seeds, **options).clean)


def _reference(networks: Networks, config: Config, batch: PromptBatch, update: int) -> Tensor:
    """The frozen start-of-stage-2 generator's clips: uniform steps, no exit steps, the same noise at the same level."""
    assert networks.reference is not None
    uniform = stage_schedule(config, 1)
    options = RollOptions(
        schedule=uniform,
        chunks=rollout_chunks(config, "generator", update),
        noise_steps=noise_at_equal_levels(config.schedule, uniform),
    )
    with torch.no_grad():
        seeds = _seeds(config, batch, "generator")
        return _scored(networks, config, rollout(networks.reference, config, batch.text, seeds, **options).clean)


def noise_at_equal_levels(ours: StepSchedule, other: StepSchedule) -> Callable[[int, int], int]:
    """Of each chunk and step of `other`, the step of `ours` that draws noise for the same level, so that both rollouts
    differ by their steps alone; a level that `ours` does not visit draws its own."""

    def number(chunk: int, step: int) -> int:
        own, levels = ours.levels(chunk), other.levels(chunk)
        if step == len(levels):  # the context pass, which both have or neither
            return len(own)
        return own.index(levels[step]) if levels[step] in own else len(own) + 1 + step

    return number


def rollout_chunks(config: Config, role: str, update: int) -> int:
    """Chunks of an update's rollouts, uniform from a clip's up to `distill.rollout_chunks`: the same on all ranks."""
    clip = config.geometry.clip_chunks
    more = max(0, config.distill.rollout_chunks - clip)
    if not more:
        return clip
    return clip + int(torch.randint(more + 1, (1,), generator=generator(config.seed, role, Salt.LENGTH, update)))


def _scored(networks: Networks, config: Config, clean: Tensor) -> Tensor:
    """The last clip of a rollout, which teacher and critic are to take for a whole one: behind earlier chunks its first
    latent is the encoded picture where it begins, as every clip's is, and takes no gradient."""
    frames = config.geometry.clip_frames
    start = clean.shape[2] - frames
    if start == 0:
        return clean
    assert networks.codec is not None
    first = max(0, start + 1 - config.serve.decoder_history_frames)
    picture = decoder_of(networks.codec).decode_clip(clean[:, :, first : start + 1].detach())[:, -1:]
    return torch.cat([encode_clips(networks.codec, picture).to(clean), clean[:, :, start + 1 :]], dim=2)


def _seeds(config: Config, batch: PromptBatch, role: str) -> list[int]:
    return [mixed_seed(config.seed, role, sample) for sample in batch.samples]


def _score(networks: Networks, config: Config, batch: PromptBatch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Clean predictions `[b, c, f, h, w]` of critic and guided teacher on the noised rollout; without gradient."""
    with torch.no_grad():
        level, noise = _score_draws(config, batch, x, "score")
        noisy = blend(x.detach(), noise, level)
        fake = to_clean(noisy, velocity(networks.critic, noisy, level, batch.text), level)
        negative = networks.negative.expand(len(noisy), -1, -1)
        real = guided_clean(networks.teacher, noisy, level, batch.text, negative, config.distill.guidance)
    return fake, real


def _score_draws(config: Config, batch: PromptBatch, x: Tensor, role: str) -> tuple[Tensor, Tensor]:
    """Level `[b]` and noise like `x`, by sample: the same however the batch is cut over ranks."""
    settings = config.distill
    draws = [generator(config.seed, role, Salt.DRAW, sample) for sample in batch.samples]
    uniform = torch.cat([torch.rand(1, generator=draw) for draw in draws])
    noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws])
    shift = settings.score_shift or config.schedule.shift
    level = losses.score_level(uniform, shift, settings.level_low, settings.level_high)
    return level.to(x.device), noise.to(x.device)


@dataclass(frozen=True)
class DistillStep:
    """One update of stage 1 or 2: the critic always, the generator every `generator_every`-th behind the warm-up.

    `first` is the update before the stage's own, `last` its last: learning rates fall towards it.
    """

    config: Config
    stage: int
    networks: Networks
    generator: Learner
    critic: Learner
    ema: Ema
    first: int
    last: int

    def __call__(self, update: int, batch: PromptBatch) -> Figures:
        settings, networks = self.config.distill, self.networks
        parts = micro_batched(batch, update, settings)
        figures: Figures = {}
        generator_applied = True
        rate = falling_rate(update, self.first, self.last, settings.lr_fall)
        if update % settings.generator_every == 0 and update > settings.critic_warmup_updates:
            terms, generator_applied = self.generator.learn(
                parts, lambda part: generator_loss(networks, self.config, part, update, self.stage), rate
            )
            if generator_applied:
                self.ema.update(update)
            figures = {"generator_gradient_norm": terms.pop("gradient_norm"), **terms}
        with rollout_scope(networks.generator):
            terms, critic_applied = self.critic.learn(
                parts, lambda part: critic_loss(networks, self.config, part, update, self.stage), rate
            )
        figures |= {"critic": terms["critic"], "critic_gradient_norm": terms["gradient_norm"]}
        return {**figures, "skipped": float(not (generator_applied and critic_applied))}
