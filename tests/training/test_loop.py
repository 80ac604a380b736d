"""Laws of the loop: what it reports, when it saves, how it stops, and that a non-finite update leaves no trace."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from diagonal.training.loop import Figures, Hooks, Learner, Plan, Stopped, Terms, TooManyNonFiniteError, run_loop
from diagonal.training.parallel import device_mesh, full_tensors, parallelize
from diagonal.training.state import TrainState
from tests.training.networks import Network, batch
from tests.training.ranks import Ranks
from tests.training.stages import PLAIN, distill_step, ode_step, pair_batch, prompt_batch, stage_config
from tests.training.states import same

NAN, INFINITY = float("nan"), float("inf")


class Journal:
    """What a loop reported and saved."""

    def __init__(self) -> None:
        self.figures: dict[int, Mapping[str, float]] = {}
        self.saves: list[tuple[int, bool]] = []

    def report(self, update: int, figures: Mapping[str, float]) -> None:
        self.figures[update] = figures

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        self.saves.append((state.update, wait))

    def hooks(self, stop: Callable[[], bool] | None = None) -> Hooks:
        return Hooks(self.report, self.save, stop)


def plan(last: int, step: Callable[[int, int], Figures] | None = None, every: int = 2, most: int = 3) -> Plan[int]:
    return Plan(last, every, 4, most, step or (lambda update, number: {"loss": 0.5}), sample_tokens=10)


def state_at(update: int = 0) -> TrainState:
    return TrainState(1, {"generator": Network()}, update=update, samples_seen=4 * update)


def test_each_update_is_reported_with_its_samples_tokens_and_the_time_it_waited_for_data() -> None:
    def slow() -> Iterator[int]:
        for number in itertools.count():
            time.sleep(0.05)
            yield number

    def step(update: int, number: int) -> Figures:
        time.sleep(0.02)
        return {"loss": float(number)}

    journal = Journal()
    run_loop(state_at(3), plan(5, step), slow(), journal.hooks())
    assert [*journal.figures] == [4, 5]
    told = dict(journal.figures[5])
    assert 0.05 <= told.pop("data_wait_s") < 1.0 and 0.02 <= told.pop("update_s") < 1.0
    assert told == {"loss": 1.0, "samples": 20, "tokens": 40}


def test_checkpoints_are_saved_at_every_nth_update_and_the_last_is_waited_for() -> None:
    journal, state = Journal(), state_at()
    run_loop(state, plan(5), itertools.count(), journal.hooks(stop=lambda: False))
    assert journal.saves == [(2, False), (4, False), (5, True)]
    assert (state.update, state.samples_seen) == (5, 20)


def test_a_loop_goes_on_from_its_state_and_one_that_is_done_does_nothing() -> None:
    journal = Journal()
    run_loop(state_at(3), plan(4), itertools.count(), journal.hooks())
    run_loop(state_at(4), plan(4), itertools.count(), journal.hooks())
    assert [*journal.figures] == [4] and journal.saves == [(4, True)]


def test_a_stop_ends_the_loop_after_its_update_with_a_checkpoint_of_it() -> None:
    journal, state = Journal(), state_at()
    with pytest.raises(Stopped, match="stopped after update 3") as caught:
        run_loop(state, plan(9), itertools.count(), journal.hooks(stop=lambda: len(journal.figures) == 3))
    assert caught.value.update == state.update == 3
    assert journal.saves == [(2, False), (3, True)]


def test_a_stop_asked_for_in_the_last_update_is_a_loop_that_finished() -> None:
    journal = Journal()
    run_loop(state_at(), plan(1), itertools.count(), journal.hooks(stop=lambda: True))
    assert journal.saves == [(1, True)]


def stopped_by_rank_1(rank: int) -> tuple[int, list[tuple[int, bool]]]:
    journal = Journal()
    with pytest.raises(Stopped) as caught:
        run_loop(
            state_at(), plan(9), itertools.count(), journal.hooks(stop=lambda: rank == 1 and len(journal.figures) == 3)
        )
    return caught.value.update, journal.saves


@pytest.mark.slow
def test_one_ranks_stop_stops_all_after_the_same_update(two_ranks: Ranks) -> None:
    assert two_ranks.run(stopped_by_rank_1) == [(3, [(2, False), (3, True)])] * 2


def skipping(*updates: int) -> Callable[[int, int], Figures]:
    return lambda update, number: {"skipped": float(update in updates)}


def test_too_many_skipped_updates_in_a_row_end_the_run_and_say_which_field_allows_more() -> None:
    journal = Journal()
    wanted = r"update 7: .*not finite 3 times in a row.*distill.max_nonfinite = 3"
    with pytest.raises(TooManyNonFiniteError, match=wanted):
        run_loop(state_at(), plan(9, skipping(2, 3, 5, 6, 7)), itertools.count(), journal.hooks())
    assert journal.figures[7]["skipped"] == 1.0
    run_loop(state_at(), plan(9, skipping(1, 2, 4, 5, 7, 8)), itertools.count(), journal.hooks())


def learner_of(network: nn.Module) -> Learner:
    return Learner(network, torch.optim.AdamW(network.parameters(), lr=0.1), clip_norm=1.0)


def learn(learner: Learner, noise: Tensor, *, gradient: float = 1.0, loss: float = 0.0) -> tuple[Figures, bool]:
    """An update on the mean square of the output: its gradient times `gradient`, `loss` added to its report."""

    def square(noise: Tensor) -> tuple[Tensor, Terms]:
        value = learner.network(noise, torch.ones(len(noise), 1)).square().mean()
        return value * gradient, {"square": value.detach() + loss}

    return learner.learn([(noise, 1.0)], square)


def state_of(learner: Learner) -> dict[str, Tensor]:
    return full_tensors(TrainState(1, {"n": learner.network}, {"n": learner.optimizer}).state_dict())


BAD = [{"gradient": NAN}, {"gradient": INFINITY}, {"loss": NAN}, {"loss": -INFINITY}]


@pytest.mark.parametrize("bad", BAD)
def test_a_non_finite_gradient_or_loss_changes_neither_weights_nor_moments(bad: dict[str, float]) -> None:
    network, noise = Network(), batch(4)
    learner = learner_of(network)
    figures, applied = learn(learner, noise)
    assert applied and figures["square"] > 0.0 and figures["gradient_norm"] > 0.0
    before = state_of(learner)
    figures, applied = learn(learner, noise, **bad)
    assert not applied and not all(map(math.isfinite, figures.values()))
    assert same(before, state_of(learner))
    assert all(parameter.grad is None for parameter in network.parameters())
    _, applied = learn(learner, noise)
    assert applied and not same(before, state_of(learner))


def bad_on_rank_1(rank: int, bad: dict[str, float]) -> tuple[bool, bool]:
    network = Network()
    parallelize(network, network.blocks, device_mesh(2, "cpu"), PLAIN, trainable=True)
    learner, noise = learner_of(network), batch(4, seed=rank)
    learn(learner, noise)
    before = state_of(learner)
    _, applied = learn(learner, noise, **(bad if rank == 1 else {}))
    return applied, same(before, state_of(learner))


@pytest.mark.parametrize("bad", [{"gradient": NAN}, {"loss": NAN}])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(two_ranks: Ranks, bad: dict[str, float]) -> None:
    assert two_ranks.run(bad_on_rank_1, bad) == [(False, True)] * 2


def test_a_stage_0_update_that_is_not_finite_changes_no_weight_moment_or_average() -> None:
    config = stage_config()
    step = ode_step(config, 1)
    state = TrainState(0, {"generator": step.learner.network}, {"generator": step.learner.optimizer}, step.ema)
    for update in (1, 2):  # from the second on the average is not the weights: another step of it would be seen
        assert step(update, pair_batch(config, update, 0, 1))["skipped"] == 0.0
    before, bad = full_tensors(state.state_dict()), pair_batch(config, 3, 0, 1)
    bad.states[3] = NAN
    assert step(3, bad)["skipped"] == 1.0
    assert same(before, full_tensors(state.state_dict()))
    assert step(4, pair_batch(config, 4, 0, 1))["skipped"] == 0.0
    assert not same(before, full_tensors(state.state_dict()))


@pytest.mark.slow
def test_a_distillation_update_that_is_not_finite_changes_no_network_or_average() -> None:
    config = stage_config("distill.batch_size=2")
    step = distill_step(config, 1)
    state = TrainState(
        1,
        {"generator": step.networks.generator, "critic": step.networks.critic},
        {"generator": step.generator.optimizer, "critic": step.critic.optimizer},
        step.ema,
    )
    for update in (1, 2):
        assert step(update, prompt_batch(config, update, 0, 1))["skipped"] == 0.0
    before, bad = full_tensors(state.state_dict()), prompt_batch(config, 3, 0, 1)
    bad.text[1] = NAN
    figures = step(3, bad)
    assert figures["skipped"] == 1.0 and math.isnan(figures["critic"]) and math.isnan(figures["generator"])
    assert same(before, full_tensors(state.state_dict()))


def test_the_generator_learns_every_nth_update_and_the_critic_always() -> None:
    config = stage_config("distill.batch_size=1", "distill.generator_every=2")
    step = distill_step(config, 1)
    for update in (1, 2):
        before = {name: value.clone() for name, value in step.networks.generator.state_dict().items()}
        critic = {name: value.clone() for name, value in step.networks.critic.state_dict().items()}
        figures = step(update, prompt_batch(config, update, 0, 1))
        assert ("dmd" in figures) == ("generator_gradient_norm" in figures) == (update == 2)
        assert same(before, step.networks.generator.state_dict()) == (update == 1)
        assert not same(critic, step.networks.critic.state_dict()) and figures["critic_gradient_norm"] > 0.0
