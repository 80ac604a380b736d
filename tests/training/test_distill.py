"""Laws of distillation: every sample draws for itself, each weight reaches the generator, stages differ as told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.training import losses
from diagonal.training.distill import Networks, PromptBatch, critic_loss, generator_loss, stage_schedule
from tests.training.stages import distill_step, prompt_batch, stage_config

OFF = ("distill.loss.spatial=0", "distill.loss.motion=0", "distill.loss.flow_regression=0")


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
    plain = stage_config("distill.batch_size=1")
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
        "distill.batch_size=2",
        "schedule.steps=1",
        "distill.stage1_steps=1",
        "schedule.context=0.0",
        "distill.loss.regression=1",
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
    config = stage_config("distill.batch_size=1", "distill.loss.gamma=0.5", "distill.loss.regression=2")
    _, terms = generator_loss(networks_of(config), config, prompt_batch(config, 1, 0, 1), 1, 2)
    told = {name: terms[name] for name in ("dmd", "motion", "flow_regression", "regression")}
    torch.testing.assert_close(terms["generator"], losses.generator_total(config.distill.loss, **told))
