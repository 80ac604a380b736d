"""Laws of stage 0: each chunk of each sample draws a state of its own trajectory, and clean chunks teach nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagonal.config import Config
from diagonal.model.attention import stage0_mask
from diagonal.training.ode_init import PairBatch, draw_states, ode_loss, state_weights
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


def test_states_are_drawn_as_often_as_the_schedules_visit_them() -> None:
    """Rows that end at raw 250 never meet raw 100; a clean sink is met by no step, as context alone."""
    config = Config.from_preset("tiny", ["schedule.steps=42@250", "distill.stage1_steps=4@250"])
    clean = config.with_settings(["schedule.sink_context=0.0"])
    assert config.pairs.kept_raw == (1000, 750, 500, 250, 100, 0)
    assert state_weights(config)[0].tolist() == [2, 2, 2, 2, 0, 0]
    assert state_weights(config)[6].tolist() == [2, 1, 1, 2, 0, 0]
    assert state_weights(clean)[0].tolist() == [2, 2, 2, 2, 0, 2]
    small = stage_config()
    weights = torch.tensor([[0.0, 3.0, 1.0]] * small.geometry.clip_chunks)
    drawn = [draw_states(small, pair_batch(small, update, 0, 1), weights)[1] for update in range(1, 41)]
    shares = [float((torch.cat(drawn) == level).float().mean()) for level in (1.0, 0.5, 0.0)]
    assert shares[0] == 0.0 and shares[1] == pytest.approx(0.75, abs=0.03)
