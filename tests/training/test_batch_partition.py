"""Laws of slices: however many ranks share a global batch, its gradient is the same, and every sample counts once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.training.batch_partition import micro_batches, own_samples, require_own
from diagonal.training.parallel import full_state_dict, full_tensors
from tests.training.ranks import Ranks
from tests.training.stages import distill_step, ode_step, pair_batch, prompt_batch, stage_config

UPDATES = 2


@pytest.mark.parametrize(("batch_size", "ranks"), [(16, 1), (16, 3), (16, 16), (7, 3), (64, 8)])
def test_the_slices_of_all_ranks_are_the_batch_and_each_sample_is_in_one(batch_size: int, ranks: int) -> None:
    slices = [own_samples(4, batch_size, rank, ranks) for rank in range(ranks)]
    assert sorted(sample for part in slices for sample in part) == list(range(3 * batch_size, 4 * batch_size))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_a_resume_at_another_world_size_sees_no_sample_twice_and_misses_none() -> None:
    seen = [
        sample
        for update, ranks in ((1, 4), (2, 4), (3, 3), (4, 1), (5, 2))
        for rank in range(ranks)
        for sample in own_samples(update, 10, rank, ranks)
    ]
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize(("batch_size", "ranks", "size"), [(16, 3, 1), (16, 3, 5), (16, 3, 16), (7, 3, 2), (8, 2, 3)])
def test_weights_of_all_ranks_add_up_to_ranks_and_all_run_as_many_micro_batches(
    batch_size: int, ranks: int, size: int
) -> None:
    by_sample: dict[int, float] = {}
    counts = set()
    for rank in range(ranks):
        own = own_samples(1, batch_size, rank, ranks)
        parts = micro_batches(len(own), size, batch_size, ranks)
        counts.add(len(parts))
        for where, weight in parts:
            for sample in own[where]:
                by_sample[sample] = by_sample.get(sample, 0.0) + weight / len(own[where])
    assert len(counts) == 1
    assert by_sample == {sample: pytest.approx(ranks / batch_size) for sample in range(batch_size)}


def test_micro_batches_of_one_rank_weigh_what_they_hold() -> None:
    assert micro_batches(5, 2, 5, 1) == [(slice(0, 2), 0.4), (slice(2, 4), 0.4), (slice(4, 5), 0.2)]
    assert micro_batches(2, 1, 7, 3) == [(slice(0, 1), 3 / 7), (slice(1, 2), 3 / 7), (slice(0, 1), 0.0)]


def test_a_batch_that_leaves_a_rank_without_samples_is_refused() -> None:
    with pytest.raises(FieldError, match="batch_size = 2: allowed is at least the number of ranks = 3"):
        own_samples(1, 2, 0, 3)
    require_own([7, 10, 13], 2, 7, 0, 3)
    with pytest.raises(FieldError, match=r"samples of update 2 on rank 1 = \[7, 10, 13\]: allowed is \[8, 11\]"):
        require_own([7, 10, 13], 2, 7, 1, 3)


def stage_0(rank: int, ranks: int, config: Config, updates: int) -> dict[str, Tensor]:
    step = ode_step(config, ranks)
    for update in range(1, updates + 1):
        assert step(update, pair_batch(config, update, rank, ranks))["skipped"] == 0.0
    return full_state_dict(step.learner.network) | full_tensors({f"ema.{k}": v for k, v in step.ema.shadow.items()})


def distilled(rank: int, ranks: int, config: Config, updates: int) -> dict[str, Tensor]:
    step = distill_step(config, ranks)
    for update in range(1, updates + 1):
        assert step(update, prompt_batch(config, update, rank, ranks))["skipped"] == 0.0
    networks = (("generator", step.networks.generator), ("critic", step.networks.critic))
    return {f"{name}.{key}": value for name, network in networks for key, value in full_state_dict(network).items()}


Stage = Callable[[int, int, Config, int], dict[str, Tensor]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(stage_0, marks=pytest.mark.nightly), distilled])
def test_three_ranks_with_slices_of_three_two_and_two_learn_what_one_rank_learns(
    three_ranks: Ranks, stage: Stage
) -> None:
    config = stage_config()
    start, expected = stage(0, 1, config, 0), stage(0, 1, config, UPDATES)
    found = three_ranks.run(stage, 3, config, UPDATES)[0]
    assert found.keys() == expected.keys() == start.keys()
    most = max(float((expected[name] - start[name]).abs().max()) for name in start)
    assert most > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name] - start[name], value - start[name], rtol=1e-3, atol=1e-3 * most)
