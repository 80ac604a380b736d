"""Laws of the losses: hand-worked numbers, exact gradients, and the signs that make distillation converge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diagonal.config.training import LossConfig
from diagonal.training import losses

SHAPE = (2, 4, 4, 2, 2)  # 128 entries: division by the count is exact


def clip(*frames: float) -> Tensor:
    """A clip of one sample, one channel and one pixel, `b c f h w`."""
    return torch.tensor(frames, dtype=torch.float32).view(1, 1, -1, 1, 1)


def random_clips(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def test_the_score_level_is_warped_then_clamped_by_sample() -> None:
    level = losses.score_level(torch.tensor([0.0, 0.25, 0.5, 1.0]), shift=5.0)
    torch.testing.assert_close(level, torch.tensor([0.02, 0.625, 5.0 / 6.0, 0.98]), rtol=0, atol=1e-7)
    assert losses.score_level(torch.tensor([0.5]), shift=1.0, low=0.6, high=0.9).item() == pytest.approx(0.6)


def test_dmd_equals_the_hand_worked_number() -> None:
    # x - r = (1, 3): normaliser 2; f - r = (2, -4): g = (1, -2); loss = (1 + 4)/2/2.
    x = clip(1.0, 3.0).requires_grad_()
    loss = losses.dmd(x, fake_clean=clip(2.0, -4.0), real_clean=clip(0.0, 0.0))
    assert loss.item() == 1.25
    assert gradient(loss, x).flatten().tolist() == [0.5, -1.0]


def test_motion_equals_the_hand_worked_number() -> None:
    # Dx = (2, 2), Dr = (0, 0), Df = (4, -2): normaliser 2, g = (2, -1); loss = (4 + 1)/2/2; gradient = D^T g / 2.
    x = clip(0.0, 2.0, 4.0).requires_grad_()
    loss = losses.motion(x, fake_clean=clip(0.0, 4.0, 2.0), real_clean=clip(7.0, 7.0, 7.0))
    assert loss.item() == 1.25
    assert gradient(loss, x).flatten().tolist() == [-1.0, 1.5, -0.5]


def test_the_gradient_of_dmd_is_exactly_the_direction_over_the_count() -> None:
    x, fake, real = random_clips(0, 3)
    x = (100.0 * x).requires_grad_()  # a large x would round a small direction away in the plain form
    direction = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert torch.equal(gradient(losses.dmd(x, fake, real), x), (direction / x.numel()).detach())


def test_the_gradient_of_motion_is_the_transposed_difference_of_its_direction() -> None:
    x, fake, real = random_clips(1, 3)
    x.requires_grad_()
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(2))
    difference, fake_difference, real_difference = (losses.frame_difference(z) for z in (x.detach(), fake, real))
    norm = (difference - real_difference).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    pull = (fake_difference - real_difference) / norm * weights[:, None, :, None, None] / difference.numel()
    expected = torch.zeros(SHAPE)
    expected[:, :, 1:] += pull
    expected[:, :, :-1] -= pull
    torch.testing.assert_close(gradient(losses.motion(x, fake, real, weights), x), expected, rtol=1e-6, atol=1e-9)


def test_motion_moves_the_generator() -> None:
    x, fake, real = random_clips(3, 3)
    x.requires_grad_()
    loss = losses.motion(x, fake, real)
    assert loss.requires_grad
    assert gradient(loss, x).abs().max() > 0.0


@pytest.mark.parametrize("loss", [losses.dmd, losses.motion])
def test_nothing_moves_where_critic_and_teacher_agree(loss) -> None:  # type: ignore[no-untyped-def]
    x, agreed = random_clips(4, 2)
    x.requires_grad_()
    assert loss(x, agreed, agreed).item() == 0.0
    assert gradient(loss(x, agreed, agreed), x).abs().max() == 0.0
    same = loss(x, x.detach(), x.detach())  # the normaliser is 0 as well: 0, not 0/0
    assert same.item() == 0.0


@pytest.mark.parametrize("loss", [losses.dmd, losses.motion])
def test_critic_and_teacher_take_no_gradient_and_the_normaliser_is_of_one_sample(loss) -> None:  # type: ignore[no-untyped-def]
    x, fake, real = (z.requires_grad_() for z in random_clips(5, 3))
    loss(x, fake, real).backward()
    assert fake.grad is None and real.grad is None
    alone = torch.stack([loss(x[i : i + 1], fake[i : i + 1], real[i : i + 1]) for i in range(2)]).mean()
    torch.testing.assert_close(loss(x, fake, real), alone)


def test_the_losses_are_computed_in_float32_of_bfloat16_inputs() -> None:
    x, fake, real = (z.bfloat16() for z in random_clips(6, 3))
    for loss in (losses.dmd, losses.motion):
        assert loss(x, fake, real).dtype == torch.float32
        assert torch.equal(loss(x, fake, real), loss(x.float(), fake.float(), real.float()))


def test_the_published_frame_weights_rise_to_two_with_a_part_of_mean_one() -> None:
    generator = torch.Generator().manual_seed(7)
    x, fake, real = (torch.randn(2, 3, 21, 2, 2, generator=generator) for _ in range(3))
    dynamic = losses.motion_frame_weights(x, fake, real, dynamic=1.0)
    assert (dynamic > 1.0).all() and (dynamic.diff(dim=1) >= 0.0).all()
    torch.testing.assert_close(dynamic[:, -1], torch.full((2,), 2.0))
    exponential = losses.motion_frame_weights(x, fake, real, dynamic=0.0)
    torch.testing.assert_close(exponential.mean(dim=1), torch.ones(2))
    assert exponential[0, 0].item() == pytest.approx(0.107, abs=5e-4)
    assert exponential[0, -1].item() == pytest.approx(3.423, abs=5e-4)
    mixed = losses.motion_frame_weights(x.requires_grad_(), fake, real)
    torch.testing.assert_close(mixed, 0.7 * dynamic + 0.3 * exponential)
    assert not mixed.requires_grad


def test_the_dynamic_frame_weight_equals_the_hand_worked_number() -> None:
    # g = (2, -1) as above; e = ((2-2)^2, (-1-4)^2) = (0, 25): shares (0, 1).
    weights = losses.motion_frame_weights(clip(0.0, 2.0, 4.0), clip(0.0, 4.0, 2.0), clip(7.0, 7.0, 7.0), dynamic=1.0)
    assert weights.tolist() == [[1.0, 2.0]]


def test_flow_regression_equals_the_hand_worked_number_and_teaches_only_the_rollout() -> None:
    # Dx = (1, 2), D ref = (0, 4): (1 + 4)/2.
    x, reference = clip(0.0, 1.0, 3.0).requires_grad_(), clip(0.0, 0.0, 4.0).requires_grad_()
    loss = losses.flow_regression(x, reference)
    assert loss.item() == 2.5
    loss.backward()
    assert reference.grad is None and x.grad is not None
    assert losses.flow_regression(x, reference, features=lambda d: 2.0 * d).item() == 10.0


def test_regression_equals_the_hand_worked_number() -> None:
    assert losses.regression(clip(1.0, 2.0), clip(0.0, 4.0)).item() == 2.5


def test_ode_regression_averages_over_kept_frames_only() -> None:
    prediction = clip(1.0, 5.0, float("nan"), 3.0).requires_grad_()
    keep = torch.tensor([[True, True, False, True]])
    loss = losses.ode_regression(prediction, clip(0.0, 4.0, 0.0, 1.0), keep)
    assert loss.item() == 2.0  # (1 + 1 + 4)/3; a frame that is not kept does not count, whatever it holds
    assert gradient(loss, prediction).flatten().tolist() == pytest.approx([2 / 3, 2 / 3, 0.0, 4 / 3])


def test_ode_regression_counts_every_entry_of_a_kept_frame_and_every_sample() -> None:
    keep = torch.zeros(2, 4, dtype=torch.bool)
    keep[0, :3] = True
    assert losses.ode_regression(torch.full(SHAPE, 3.0), torch.ones(SHAPE), keep).item() == 2.0  # (4 + 0)/2
    assert losses.ode_regression(torch.ones(SHAPE), torch.zeros(SHAPE), torch.zeros_like(keep)).item() == 0.0


def test_ode_regression_of_a_batch_is_the_mean_of_its_samples() -> None:
    prediction, target = random_clips(9, 2)
    keep = torch.tensor([[True, False, False, False], [True, True, True, False]])
    alone = [losses.ode_regression(prediction[i : i + 1], target[i : i + 1], keep[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(losses.ode_regression(prediction, target, keep), torch.stack(alone).mean())


def test_critic_flow_equals_the_hand_worked_number_and_does_not_reach_the_rollout() -> None:
    clean = clip(1.0, 1.0).requires_grad_()
    prediction = clip(2.0, 0.0).requires_grad_()
    loss = losses.critic_flow(prediction, noise=clip(2.0, 4.0), clean=clean)
    assert loss.item() == 5.0  # velocity (1, 3): (1 + 9)/2
    loss.backward()
    assert clean.grad is None
    assert prediction.grad is not None and prediction.grad.flatten().tolist() == [1.0, -3.0]


def test_the_total_weighs_each_term_by_its_field() -> None:
    weights = LossConfig(spatial=2.0, regression=3.0, gamma=5.0, motion=7.0, flow_regression=11.0)
    one = torch.tensor(1.0)
    assert losses.generator_total(weights, dmd=one).item() == 2.0
    total = losses.generator_total(weights, dmd=one, motion=one, flow_regression=one, regression=one)
    assert total.item() == 2.0 + 3.0 + 5.0 * (7.0 + 11.0)


def gaussian_descent(swap: bool, updates: int = 400) -> float:
    """Distance of a generator's mean to the teacher's after descent on `dmd` with exact posterior means."""
    generator, teacher_mean = torch.Generator().manual_seed(8), 1.5
    mean = torch.zeros(1, requires_grad=True)
    for _ in range(updates):
        x = mean + torch.randn(64, 1, 1, 1, 1, generator=generator)
        level = losses.score_level(torch.rand(64, generator=generator), shift=5.0).view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * x.detach() + level * torch.randn(x.shape, generator=generator)
        gain = (1 - level) / ((1 - level) ** 2 + level**2)
        fake, real = (m + gain * (noisy - (1 - level) * m) for m in (mean.detach(), torch.tensor(teacher_mean)))
        loss = losses.dmd(x, real, fake) if swap else losses.dmd(x, fake, real)
        mean.data -= 0.05 * gradient(loss, mean)
    return abs(mean.item() - teacher_mean)


def test_descent_on_dmd_reaches_the_teachers_mean_and_swapped_scores_flee_from_it() -> None:
    assert gaussian_descent(swap=False) < 0.1
    assert gaussian_descent(swap=True, updates=10) > 10.0
