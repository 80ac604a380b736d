"""Stage 0: the causal student learns the teacher's ODE solutions under the block-causal mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagonal.config import Config
from diagonal.diffusion.flow import to_clean
from diagonal.diffusion.noise import Salt, generator
from diagonal.model.attention import BlockCausal
from diagonal.schedule import raw_level
from diagonal.training.ema import Ema
from diagonal.training.loop import Figures, Learner, Terms, falling_rate, micro_batched
from diagonal.training.losses import ode_regression


@dataclass(frozen=True)
class PairBatch:
    """Trajectories: `states` `[b, s, c, f, h, w]` at falling `levels` `[s]` (the last is 0), their prompts' embeddings
    `[b, l, n]`, and the global sample numbers that seed their draws."""

    states: Tensor
    levels: Tensor
    text: Tensor
    samples: Sequence[int]

    def part(self, where: slice) -> PairBatch:
        """Some of its samples."""
        return PairBatch(self.states[where], self.levels, self.text[where], self.samples[where])


def state_weights(config: Config) -> Tensor:
    """How often each state of a trajectory is met by a chunk in stages 1 and 2, `[chunks, states]`: as a step's input,
    or as the context that a finished chunk leaves.

    A level that pairs do not keep counts for the kept state nearest to it.
    """
    kept = [raw_level(raw, config.schedule.shift) for raw in config.pairs.kept_raw]
    weights = torch.zeros(config.geometry.clip_chunks, len(kept))
    for schedule in (config.schedule.with_steps(config.distill.stage1_steps), config.schedule):
        for chunk in range(len(weights)):
            context = [] if schedule.context_of(chunk) == "reuse" else [schedule.context_level(chunk)]
            for level in (*schedule.levels(chunk), *context):
                weights[chunk, min(range(len(kept)), key=lambda n: abs(kept[n] - level))] += 1.0
    return weights


def draw_states(config: Config, batch: PairBatch, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One random state for each chunk of each sample: latents `[b, c, f, h, w]` and levels `[b, f]`.

    `weights` `[chunks, states]` says how often each is drawn; without them all alike.
    """
    chunks, frames = config.geometry.clip_chunks, config.geometry.chunk_frames
    weights = torch.ones(chunks, len(batch.levels)) if weights is None else weights
    choice = torch.stack(
        [
            torch.multinomial(weights, 1, generator=generator(config.seed, Salt.ODE, sample))[:, 0]
            for sample in batch.samples
        ]
    )
    by_frame = choice.repeat_interleave(frames, dim=1).to(batch.states.device)
    index = by_frame[:, None, None, :, None, None].expand(-1, 1, batch.states.shape[2], -1, *batch.states.shape[4:])
    return batch.states.gather(1, index)[:, 0], batch.levels[by_frame]


def ode_loss(
    network: nn.Module, config: Config, batch: PairBatch, mask: BlockCausal, weights: Tensor | None = None
) -> Tensor:
    """Mean squared error of the clean prediction to the trajectory's end, over chunks that are not clean already."""
    latents, levels = draw_states(config, batch, weights)
    velocity = network(latents, levels, batch.text, mask=mask)
    return ode_regression(to_clean(latents, velocity, levels), batch.states[:, -1], levels > 0)


@dataclass(frozen=True)
class OdeInitStep:
    """One update of stage 0."""

    config: Config
    learner: Learner
    ema: Ema
    mask: BlockCausal
    states: Tensor | None = None

    def __call__(self, update: int, batch: PairBatch) -> Figures:
        options = self.config.ode_init
        rate = falling_rate(update, 0, options.updates, options.lr_fall)
        figures, applied = self.learner.learn(micro_batched(batch, update, options), self._loss, rate)
        if applied:
            self.ema.update(update)
        return {**figures, "skipped": float(not applied)}

    def _loss(self, part: PairBatch) -> tuple[Tensor, Terms]:
        loss = ode_loss(self.learner.network, self.config, part, self.mask, self.states)
        return loss, {"ode_regression": loss.detach()}
