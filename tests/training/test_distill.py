"""Laws of distillation: every sample draws for itself, each weight reaches the generator, stages differ as told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagonal.config import Config
from diagonal.data.embedded import embedded_world
from diagonal.model.base_model import base_folder, load_codec
from diagonal.model.vae import AutoencoderKLWan, LinearCodec, decoder_of, encode_clips
from diagonal.schedule import StepSchedule
from diagonal.training import distill, losses
from diagonal.training.distill import (
    DistillStep,
    Networks,
    PromptBatch,
    critic_loss,
    generator_loss,
    noise_at_equal_levels,
    rollout_chunks,
    stage_schedule,
)
from diagonal.training.loop import falling_rate
from tests.training.stages import distill_step, prompt_batch, stage_config

FOLLOWS = ("distill.loss.flow_regression=1", "distill.loss.regression=1")
OFF = ("distill.loss.spatial=0", "distill.loss.motion=0", "distill.loss.flow_regression=0")


def tiny_config(*settings: str) -> Config:
    return Config.from_preset("tiny-textured", settings)


def codec_latents(config: Config, codec: AutoencoderKLWan | LinearCodec, frames: int) -> Tensor:
    """Latents of a clip of the embedded world, as long as it takes."""
    world = embedded_world(config)
    _, clips = world.sample(3, 2)
    parts = encode_clips(codec, torch.from_numpy(clips))
    return torch.cat([parts[:1], parts[1:, :, 1 : frames - parts.shape[2] + 1]], dim=2)


def networks_of(config: Config) -> Networks:
    return distill_step(config, 1).networks


def generator_gradient(networks: Networks, config: Config, batch: PromptBatch) -> Tensor:
    networks.generator.zero_grad()
    generator_loss(networks, config, batch, 1, 2)[0].backward()
    return torch.cat([p.grad.flatten() for p in networks.generator.parameters() if p.grad is not None])


@pytest.mark.parametrize("field", ["spatial", "motion", "flow_regression", "regression"])
def test_each_term_alone_moves_the_generator_and_nothing_else(field: str) -> None:
    config = stage_config("distill.batch_size=1", *OFF, f"distill.loss.{field}=1")
    networks = networks_of(config)
    assert generator_gradient(networks, config, prompt_batch(config, 1, 0, 1)).abs().max() > 0.0
    others = (networks.critic, networks.teacher, networks.reference)
    assert all(p.grad is None for network in others if network is not None for p in network.parameters())


def test_with_every_weight_at_0_nothing_moves() -> None:
    config = stage_config("distill.batch_size=1", *OFF)
    gradient = generator_gradient(networks_of(config), config, prompt_batch(config, 1, 0, 1))
    assert gradient.abs().max() == 0.0


def test_the_published_frame_weights_change_the_motion_term_alone() -> None:
    plain = stage_config("distill.batch_size=1", *FOLLOWS)
    weighted = plain.with_settings(["distill.loss.motion_weights=true"])
    networks, batch = networks_of(plain), prompt_batch(plain, 1, 0, 1)
    (_, before), (_, after) = (generator_loss(networks, config, batch, 1, 2) for config in (plain, weighted))
    assert before["motion"] != after["motion"]
    assert all(torch.equal(before[name], after[name]) for name in ("dmd", "flow_regression", "regression"))


@pytest.mark.slow
def test_the_loss_of_a_batch_is_the_mean_of_its_samples_alone() -> None:
    config = stage_config("distill.batch_size=3")
    networks, batch = networks_of(config), prompt_batch(config, 2, 0, 1)
    alone = [batch.part(slice(i, i + 1)) for i in range(3)]
    for loss in (generator_loss, critic_loss):
        (whole, terms), parts = loss(networks, config, batch, 2, 2), [loss(networks, config, p, 2, 2) for p in alone]
        torch.testing.assert_close(whole, torch.stack([total for total, _ in parts]).mean(), rtol=1e-4, atol=1e-6)
        for name, term in terms.items():
            mean = torch.stack([found[name] for _, found in parts]).mean()
            torch.testing.assert_close(term, mean, rtol=1e-4, atol=1e-6)


def test_stage_1_has_uniform_steps_without_reference_and_stage_2_the_diagonal() -> None:
    config = stage_config("distill.batch_size=1", "schedule.steps=4322222", "distill.stage1_steps=4")
    assert [len(stage_schedule(config, 1).levels(chunk)) for chunk in range(7)] == [4] * 7
    assert [len(stage_schedule(config, 2).levels(chunk)) for chunk in range(7)] == [4, 3, 2, 2, 2, 2, 2]
    assert stage_schedule(config, 1).resolved_context == stage_schedule(config, 2).resolved_context
    step = distill_step(config, 1, stage=1)
    _, terms = generator_loss(step.networks, config, prompt_batch(config, 1, 0, 1), 1, 1)
    assert sorted(terms) == ["dmd", "generator", "motion"]
    with pytest.raises(ValueError, match="stage = 3"):
        stage_schedule(config, 3)


def test_the_reference_rolls_out_from_the_generators_own_noise() -> None:
    """With one step a chunk the exit is that step, so a reference that is the generator gives the same clip."""
    config = stage_config(
        "distill.batch_size=2", "schedule.steps=1", "distill.stage1_steps=1", "schedule.context=0.0", *FOLLOWS
    )
    found = networks_of(config)
    networks = Networks(found.generator, found.critic, found.teacher, found.negative, found.generator)
    _, terms = generator_loss(networks, config, prompt_batch(config, 1, 0, 1), 1, 2)
    assert terms["flow_regression"] < 1e-12 and terms["regression"] < 1e-12  # rounding alone
    networks = Networks(found.generator, found.critic, found.teacher, found.negative, found.reference)
    _, terms = generator_loss(networks, config, prompt_batch(config, 1, 0, 1), 1, 2)
    assert terms["flow_regression"] > 1e-3 and terms["regression"] > 1e-3


def test_the_critic_learns_its_velocity_on_the_generators_clips_and_leaves_the_generator() -> None:
    config = stage_config("distill.batch_size=1")
    networks = networks_of(config)
    loss, terms = critic_loss(networks, config, prompt_batch(config, 1, 0, 1), 1, 2)
    loss.backward()
    assert torch.equal(terms["critic"], loss.detach()) and loss > 0.0
    assert all(p.grad is None for p in networks.generator.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0.0 for p in networks.critic.parameters())


def test_the_total_is_the_weighted_sum_of_the_told_terms() -> None:
    config = stage_config("distill.batch_size=1", *FOLLOWS, "distill.loss.gamma=0.5", "distill.loss.regression=2")
    _, terms = generator_loss(networks_of(config), config, prompt_batch(config, 1, 0, 1), 1, 2)
    told = {name: terms[name] for name in ("dmd", "motion", "flow_regression", "regression")}
    torch.testing.assert_close(terms["generator"], losses.generator_total(config.distill.loss, **told))


# The hand-over of noise, contexts and lengths between rollouts


def flow_regression_of(config: Config, networks: Networks) -> float:
    return float(generator_loss(networks, config, prompt_batch(config, 1, 0, 1), 1, 2)[1]["flow_regression"])


def test_equal_weights_on_equal_schedules_regress_to_exactly_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = stage_config("distill.batch_size=2", "schedule.steps=4", "distill.stage1_steps=4", *FOLLOWS)
    found = networks_of(config)
    networks = replace(found, reference=found.generator)
    monkeypatch.setattr(distill, "draw_exit_steps", lambda schedule, chunks, *key: [3] * len(chunks))
    with torch.no_grad():  # with gradients attention takes another kernel, which rounds otherwise
        assert flow_regression_of(config, networks) == 0.0


def test_another_row_draws_the_same_noise_at_the_same_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rollout then lies nearer than with the noise of the same step, or of stranger seeds."""
    config = stage_config("distill.batch_size=6", "distill.micro_batch_size=6", "schedule.steps=2@250", *FOLLOWS)
    config = config.with_settings(["distill.stage1_steps=4@250"])
    found = networks_of(config)
    networks = replace(found, reference=found.generator)
    monkeypatch.setattr(distill, "draw_exit_steps", lambda schedule, chunks, *key: [1] * len(chunks))
    aligned = flow_regression_of(config, networks)
    monkeypatch.setattr(distill, "noise_at_equal_levels", lambda ours, other: lambda chunk, step: step)
    by_step = flow_regression_of(config, networks)
    monkeypatch.setattr(distill, "noise_at_equal_levels", lambda ours, other: lambda chunk, step: 50 + step)
    assert aligned < 0.9 * by_step and aligned < 0.9 * flow_regression_of(config, networks)


@pytest.mark.parametrize("context", ["reuse", 0.2])
def test_steps_of_another_schedule_are_matched_by_level_alone(context: Any) -> None:
    ours = StepSchedule("4322222@250", context=context)
    number = noise_at_equal_levels(ours, ours.with_steps("4@250"))
    assert [number(0, step) for step in range(4)] == [0, 1, 2, 3]
    assert [number(1, step) for step in range(4)] == [0, 1, 6, 2], "three steps: the third level is a stranger's"
    assert [number(2, step) for step in range(4)] == [0, 4, 5, 1]
    assert number(2, 4) == 2, "both contexts are written at one level"


def test_long_rollouts_score_their_last_clip_behind_an_encoded_picture() -> None:
    config = tiny_config("distill.rollout_chunks=9", "distill.batch_size=1")
    lengths = [rollout_chunks(config, "generator", update) for update in range(60)]
    assert set(lengths) == {7, 8, 9} and lengths != [rollout_chunks(config, "critic", update) for update in range(60)]
    codec = load_codec(base_folder(config), config)
    found = networks_of(stage_config("distill.batch_size=1"))
    latents = codec_latents(config, codec, frames=27).requires_grad_()
    clip = distill._scored(replace(found, codec=codec), config, latents)
    assert clip.shape == latents[:, :, :21].shape and torch.equal(clip[:, :, 1:], latents[:, :, 7:])
    pixels = decoder_of(codec).decode_clip(latents.detach())
    expected = encode_clips(codec, pixels[:, 24:25])
    torch.testing.assert_close(clip[:, :, :1], expected, rtol=0, atol=0.2)
    clip.sum().backward()
    assert latents.grad is not None and latents.grad[:, :, 7:].eq(1).all() and latents.grad[:, :, :7].eq(0).all()
    assert distill._scored(found, config, latents[:, :, :21]).shape[2] == 21, "a clip from its start is left as it is"


def test_scores_have_a_warp_of_their_own_where_one_is_set() -> None:
    plain = stage_config("distill.batch_size=7")
    batch = prompt_batch(plain, 1, 0, 1)
    x = torch.zeros(7, *plain.geometry.clip_shape()[1:])
    levels = [
        distill._score_draws(config, batch, x, "score")[0]
        for config in (plain, plain.with_settings(["distill.score_shift=1"]))
    ]
    assert (levels[0] >= levels[1]).all() and levels[0].mean() > levels[1].mean() + 0.1


# What an update does


def test_the_critic_learns_alone_before_the_generator_does() -> None:
    config = stage_config("distill.critic_warmup_updates=2")
    step = distill_step(config, 1)
    for update in (1, 2, 3):
        before = {name: flat(network) for name, network in networks_by_name(step).items()}
        step(update, prompt_batch(config, update, 0, 1))
        moved = {name: not torch.equal(before[name], flat(n)) for name, n in networks_by_name(step).items()}
        assert moved == {"generator": update > 2, "critic": True}


def test_rates_fall_linearly_over_the_last_share_of_a_stage_and_the_optimizer_keeps_the_full_one() -> None:
    rates = [falling_rate(update, 100, 110, 0.5) for update in range(101, 111)]
    assert rates == [1.0] * 6 + [0.8, 0.6, 0.4, 0.2]
    assert {falling_rate(update, 0, 10, 0.0) for update in range(1, 11)} == {1.0}
    moved = []
    for last in (1000, 1):  # update 1 at the full rate, and as the last but one of a falling stage
        config = stage_config("distill.batch_size=1", "distill.lr_fall=1")
        step = replace(distill_step(config, 1), last=last if last == 1000 else 2)
        before = flat(step.networks.generator)
        step(2, prompt_batch(config, 2, 0, 1))
        moved.append(flat(step.networks.generator) - before)
        assert step.generator.optimizer.param_groups[0]["lr"] == 0.02
    torch.testing.assert_close(moved[1] / 0.5, moved[0] / 0.999, rtol=1e-3, atol=1e-6)


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def networks_by_name(step: DistillStep) -> dict[str, nn.Module]:
    return {"generator": step.networks.generator, "critic": step.networks.critic}
