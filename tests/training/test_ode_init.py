"""Laws of stage 0: each chunk of each sample draws a state of its own trajectory, and clean chunks teach nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diagonal.model.attention import stage0_mask
from diagonal.training.ode_init import PairBatch, draw_states, ode_loss
from tests.training.stages import pair_batch, stage_config


class Oracle(nn.Module):
    """Predicts the velocity that leads exactly to `ends` `[b, c, f, h, w]`, plus `error` where the level is not 0."""

    def __init__(self, ends: Tensor, error: float = 0.0, clean_error: float = 0.0) -> None:
        super().__init__()
        self.ends, self.error, self.clean_error = ends, error, clean_error

    def forward(self, latents: Tensor, levels: Tensor, text: Tensor, *, mask: object) -> Tensor:
        level = levels[:, None, :, None, None]
        clean = self.ends + self.error
        velocity = (latents - clean) / level.clamp_min(1e-6)
        return torch.where(level > 0, velocity, torch.full_like(velocity, self.clean_error))


def test_a_perfect_prediction_costs_nothing_whatever_is_said_of_clean_chunks() -> None:
    config = stage_config()
    batch = pair_batch(config, 1, 0, 1)
    ends, mask = batch.states[:, -1], stage0_mask(config)
    assert ode_loss(Oracle(ends, clean_error=1e6), config, batch, mask) < 1e-9
    torch.testing.assert_close(ode_loss(Oracle(ends, error=0.5), config, batch, mask), torch.tensor(0.25))


def test_a_batch_whose_levels_are_all_0_costs_0() -> None:
    config = stage_config()
    batch = pair_batch(config, 1, 0, 1)
    clean = PairBatch(batch.states, torch.zeros(3), batch.text, batch.samples)
    assert ode_loss(Oracle(batch.states[:, -1], 1.0, 1.0), config, clean, stage0_mask(config)) == 0.0


def test_every_chunk_takes_one_state_of_its_sample_whole_and_the_level_of_that_state() -> None:
    config = stage_config()
    batch, frames = pair_batch(config, 1, 0, 1), config.geometry.chunk_frames
    latents, levels = draw_states(config, batch)
    chosen = set()
    for sample in range(len(batch.samples)):
        for chunk in range(config.geometry.clip_chunks):
            part = slice(chunk * frames, (chunk + 1) * frames)
            (state,) = [s for s in range(3) if torch.equal(latents[sample, :, part], batch.states[sample, s, :, part])]
            assert levels[sample, part].tolist() == [batch.levels[state].item()] * frames
            chosen.add((chunk, state))
    assert len(chosen) > 2 * config.geometry.clip_chunks  # chunks do not share one draw


def test_a_samples_draw_does_not_depend_on_its_batch() -> None:
    config = stage_config()
    batch = pair_batch(config, 1, 0, 1)
    latents, levels = draw_states(config, batch)
    alone, own = draw_states(config, batch.part(slice(4, 5)))
    assert torch.equal(latents[4:5], alone) and torch.equal(levels[4:5], own)
