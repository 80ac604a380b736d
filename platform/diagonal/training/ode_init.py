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
from diagonal.training.ema import Ema
from diagonal.training.loop import Figures, Learner, Terms, micro_batched
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


def draw_states(config: Config, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """One random state for each chunk of each sample: latents `[b, c, f, h, w]` and levels `[b, f]`."""
    chunks, frames = config.geometry.clip_chunks, config.geometry.chunk_frames
    choice = torch.stack(
        [
            torch.randint(len(batch.levels), (chunks,), generator=generator(config.seed, Salt.ODE, sample))
            for sample in batch.samples
        ]
    )
    by_frame = choice.repeat_interleave(frames, dim=1).to(batch.states.device)
    index = by_frame[:, None, None, :, None, None].expand(-1, 1, batch.states.shape[2], -1, *batch.states.shape[4:])
    return batch.states.gather(1, index)[:, 0], batch.levels[by_frame]


def ode_loss(network: nn.Module, config: Config, batch: PairBatch, mask: BlockCausal) -> Tensor:
    """Mean squared error of the clean prediction to the trajectory's end, over chunks that are not clean already."""
    latents, levels = draw_states(config, batch)
    velocity = network(latents, levels, batch.text, mask=mask)
    return ode_regression(to_clean(latents, velocity, levels), batch.states[:, -1], levels > 0)


@dataclass(frozen=True)
class OdeInitStep:
    """One update of stage 0."""

    config: Config
    learner: Learner
    ema: Ema
    mask: BlockCausal

    def __call__(self, update: int, batch: PairBatch) -> Figures:
        figures, applied = self.learner.learn(micro_batched(batch, update, self.config.ode_init), self._loss)
        if applied:
            self.ema.update(update)
        return {**figures, "skipped": float(not applied)}

    def _loss(self, part: PairBatch) -> tuple[Tensor, Terms]:
        loss = ode_loss(self.learner.network, self.config, part, self.mask)
        return loss, {"ode_regression": loss.detach()}
