"""Laws of parallelism: sharding, recomputation and precision change neither names nor gradients nor the level seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from diagonal.training.ema import Ema
from diagonal.training.parallel import (
    ParallelPlan,
    Precision,
    any_rank,
    clip_gradients,
    device_mesh,
    finish_gradients,
    full_state_dict,
    full_tensors,
    parallelize,
    rollout_scope,
)
from tests.training.networks import Network, batch, rollout
from tests.training.ranks import CollectiveCounter, Ranks

PLAIN = ParallelPlan()
RECOMPUTED = ParallelPlan(checkpoint_blocks=True)
NARROW = ParallelPlan(Precision(param="bfloat16"), checkpoint_blocks=True)
GROUPS = 3  # two blocks and the root
MICRO_BATCHES = 2


def build(plan: ParallelPlan, world_size: int, *, trainable: bool = True, shard_group: int = 0) -> Network:
    network = Network()
    return parallelize(network, network.blocks, device_mesh(world_size, "cpu", shard_group), plan, trainable=trainable)


def run_update(network: nn.Module, noise: Tensor) -> None:
    """One update: two micro-batches, each a rollout of many forwards and one backward."""
    with rollout_scope(network):
        for part in noise.chunk(MICRO_BATCHES):
            (rollout(network, part).square().mean() / MICRO_BATCHES).backward()
        finish_gradients(network)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return full_tensors({name: p.grad for name, p in network.named_parameters() if p.grad is not None})


def part_of(noise: Tensor, rank: int, world_size: int = 2) -> Tensor:
    """A rank's rows, arranged so that its micro-batches are those of the whole batch."""
    return torch.cat([part.chunk(world_size)[rank] for part in noise.chunk(MICRO_BATCHES)])


def one_process(plan: ParallelPlan) -> dict[str, Tensor]:
    network = build(plan, world_size=1)
    run_update(network, batch(8))
    return gradients(network)


def sharded_update(rank: int, plan: ParallelPlan, shard_group: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    network = build(plan, 2, shard_group=shard_group)
    noise = part_of(batch(8), rank)
    run_update(network, noise)  # the first update also makes FSDP's own state
    network.zero_grad()
    with CollectiveCounter() as collectives:
        run_update(network, noise)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    return gradients(network), dict(collectives.counts)


@pytest.mark.parametrize(("plan", "tolerance"), [(PLAIN, 1e-6), (RECOMPUTED, 1e-6), (NARROW, 2e-2)])
def test_an_update_of_many_forwards_reduces_each_group_once(
    two_ranks: Ranks, plan: ParallelPlan, tolerance: float
) -> None:
    expected = one_process(plan)
    for found, counts in two_ranks.run(sharded_update, plan, 0):
        assert counts == {"_reduce_scatter_base_": GROUPS, "_allgather_base_": GROUPS}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * 0.1)


def test_copies_replicated_beyond_a_shard_group_have_the_gradient_of_the_whole_batch(two_ranks: Ranks) -> None:
    expected = one_process(PLAIN)
    for found, _ in two_ranks.run(sharded_update, PLAIN, 1):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


def gradients_before_and_after_finishing(rank: int) -> tuple[bool, bool, bool]:
    network = build(PLAIN, 2)
    rollout(network, batch(4, seed=rank)).square().mean().backward()
    before = any(parameter.grad is not None for parameter in network.parameters())
    finish_gradients(network)
    after = all(parameter.grad is not None for parameter in network.parameters())
    first = gradients(network)
    finish_gradients(network)
    return before, after, all(torch.equal(first[name], again) for name, again in gradients(network).items())


def test_gradients_stay_local_until_finished_and_finishing_twice_adds_nothing(two_ranks: Ranks) -> None:
    assert two_ranks.run(gradients_before_and_after_finishing) == [(False, True, True)] * 2


def gathered_in_scope(rank: int) -> list[int]:
    network = build(PLAIN, 2)
    noise = batch(2, seed=rank)
    with CollectiveCounter() as collectives, torch.no_grad():
        rollout(network, noise)
        outside = collectives.gathers
        try:
            with rollout_scope(network):
                rollout(network, noise)
                raise KeyError("a failing rollout")
        except KeyError:
            inside = collectives.gathers - outside
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        rollout(network, noise)
    return [outside, inside, collectives.gathers - outside - inside]


def test_parameters_are_gathered_once_a_scope_and_sharded_after_it_even_on_errors(two_ranks: Ranks) -> None:
    forwards = 6
    assert two_ranks.run(gathered_in_scope) == [[forwards * GROUPS, GROUPS, forwards * GROUPS]] * 2


def names_and_weights(rank: int, plan: ParallelPlan) -> tuple[list[str], dict[str, Tensor], list[str]]:
    network = build(plan, 2)
    return [name for name, _ in network.named_parameters()], full_state_dict(network), [*network.state_dict()]


@pytest.mark.parametrize("plan", [PLAIN, NARROW])
def test_names_and_weights_stay_and_rank_0_can_gather_them(two_ranks: Ranks, plan: ParallelPlan) -> None:
    original = Network()
    (names, whole, keys), (_, nothing, _) = two_ranks.run(names_and_weights, plan)
    assert names == [name for name, _ in original.named_parameters()]
    assert keys == [*whole] == [*original.state_dict()]
    assert all(torch.equal(whole[name], value) for name, value in original.state_dict().items())
    assert nothing == {}


@pytest.mark.parametrize("plan", [PLAIN, NARROW])
def test_one_rank_is_the_plain_module(plan: ParallelPlan) -> None:
    network = build(plan, world_size=1)
    assert type(network) is Network and not any(isinstance(part, FSDPModule) for part in network.modules())
    whole = full_state_dict(network)
    assert [*whole] == [*Network().state_dict()]
    whole["inward.weight"].zero_()
    assert network.inward.weight.abs().sum() > 0.0


def seen_in_blocks(rank: int, world_size: int) -> list[tuple[Tensor, torch.dtype, torch.dtype]]:
    network = build(NARROW, world_size)
    network(batch(2), torch.full((2, 1), 0.9375))
    return network.block(1).seen


def test_the_level_inside_a_block_is_exact_and_the_kept_parts_are_float32(two_ranks: Ranks) -> None:
    for seen in (*two_ranks.run(seen_in_blocks, 2), seen_in_blocks(0, 1)):
        ((time, weight, table),) = seen
        assert torch.equal(time, torch.full((2, 1), 937.5))
        assert (weight, table) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("trainable", [True, False])
def test_narrow_training_computes_what_the_stored_narrow_weights_compute(trainable: bool) -> None:
    network = build(NARROW, 1, trainable=trainable)
    stored = Network()
    for name, parameter in stored.named_parameters():
        parameter.data = parameter.data if "scale_shift_table" in name else parameter.data.bfloat16()
    level = torch.full((3, 1), 0.625)
    assert torch.equal(network(batch(3), level), stored(batch(3), level))
    dtypes = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.mix.weight"] == (torch.float32 if trainable else torch.bfloat16)
    assert all(parameter.requires_grad == trainable for parameter in network.parameters())


def wan() -> Any:
    """Diffusers' own network, which casts no input itself."""
    from diffusers import WanTransformer3DModel  # here, as every rank imports this file and few need it

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=8,
            ffn_dim=16,
            num_layers=2,
        )


def wan_gradients(network: Any, mesh: DeviceMesh | None) -> tuple[Tensor, dict[str, Tensor]]:
    parallelize(network, network.blocks, mesh, NARROW, trainable=True)
    latents, text = batch(2 * 4 * 3 * 4 * 4, 1).view(2, 4, 3, 4, 4), batch(2 * 5, 8).view(2, 5, 8)
    output = network(latents, torch.full((2,), 937.5), encoder_hidden_states=text).sample.float()
    output.square().mean().backward()
    finish_gradients(network)
    return output.detach(), gradients(network)


def sharded_wan(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    return wan_gradients(wan(), device_mesh(2, "cpu"))


@pytest.mark.slow
def test_diffusers_narrow_network_takes_float32_and_computes_as_its_weights_do(two_ranks: Ranks) -> None:
    stored: Any = wan()
    output, expected = wan_gradients(wan(), None)
    for name, parameter in stored.named_parameters():
        if set(name.split(".")).isdisjoint(stored._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    assert stored.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    latents, text = batch(2 * 4 * 3 * 4 * 4, 1).view(2, 4, 3, 4, 4), batch(2 * 5, 8).view(2, 5, 8)
    narrow = stored(latents.bfloat16(), torch.full((2,), 937.5), text.bfloat16()).sample.float()
    assert torch.equal(output, narrow)
    for sharded_output, found in two_ranks.run(sharded_wan):
        assert torch.equal(sharded_output, output)
        assert found.keys() == expected.keys() == dict(stored.named_parameters()).keys()
        for name, gradient in expected.items():  # narrow sums in backward are rounded in another order
            assert (found[name] - gradient).norm() <= 0.01 * gradient.norm() + 1e-6, name


def test_gradients_of_narrow_forwards_add_up_in_float32() -> None:
    network = build(NARROW, 1)
    run_update(network, batch(8))
    alone = []
    for part in batch(8).chunk(MICRO_BATCHES):
        network_alone = build(NARROW, 1)
        (rollout(network_alone, part).square().mean() / MICRO_BATCHES).backward()
        alone.append(gradients(network_alone))
    for name, gradient in gradients(network).items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, alone[0][name] + alone[1][name])


def test_recomputed_blocks_run_twice_with_gradient_and_give_the_same_ones() -> None:
    network = build(RECOMPUTED, 1)
    x, level = batch(2), torch.ones(2, 1)
    with torch.no_grad():
        network(x, level)
    assert len(network.block(0).seen) == 1
    network(x, level).sum().backward()
    assert len(network.block(0).seen) == 3
    plain = build(PLAIN, 1)
    plain(x, level).sum().backward()
    expected = gradients(plain)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(network).items())


def test_a_copy_of_a_parallelized_network_computes_with_its_own_weights() -> None:
    network = build(NARROW, 1)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert network(batch(2), torch.ones(2, 1)).abs().max() == 0.0
    assert twin(batch(2), torch.ones(2, 1)).abs().max() > 0.0


def frozen_output(rank: int) -> Tensor:
    return build(NARROW, 2, trainable=False)(batch(3), torch.ones(3, 1))


def test_a_frozen_narrow_network_computes_the_same_when_sharded(two_ranks: Ranks) -> None:
    expected = build(NARROW, 1, trainable=False)(batch(3), torch.ones(3, 1))
    assert all(torch.equal(output, expected) for output in two_ranks.run(frozen_output))


def test_clipping_scales_to_the_norm_and_returns_the_one_before() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, max_norm=10.0).item() == 5.0
    assert parameters[0].grad.item() == 3.0
    assert clip_gradients(parameters, max_norm=1.0).item() == 5.0
    torch.testing.assert_close(torch.stack([parameters[0].grad, parameters[1].grad]), torch.tensor([[0.6], [0.8]]))
    assert not clip_gradients([nn.Parameter(torch.full((1,), 2.0))], max_norm=1.0).item()


def clipped(rank: int) -> tuple[float, float]:
    network = build(PLAIN, 2)
    run_update(network, part_of(batch(8), rank))
    norm = clip_gradients(network.parameters(), max_norm=0.01)
    assert not isinstance(norm, DTensor)
    return norm.item(), clip_gradients(network.parameters(), max_norm=1e9).item()


def test_the_norm_of_sharded_gradients_is_that_of_the_whole_network(two_ranks: Ranks) -> None:
    network = build(PLAIN, 1)
    run_update(network, batch(8))
    expected = clip_gradients(network.parameters(), max_norm=1e9).item()
    for before, after in two_ranks.run(clipped):
        assert before == pytest.approx(expected, rel=1e-5)
        assert after == pytest.approx(0.01, rel=1e-3)


def decisions(rank: int) -> list[bool]:
    return [any_rank(flag) for flag in (rank == 0, True, False, torch.tensor(rank == 0))]


def test_a_decision_is_the_same_on_every_rank(two_ranks: Ranks) -> None:
    assert two_ranks.run(decisions) == [[True, True, False, True]] * 2
    assert (any_rank(True), any_rank(torch.tensor(False))) == (True, False)


def averaged(rank: int) -> tuple[bool, dict[str, Tensor]]:
    network = build(PLAIN, 2)
    ema = Ema(network.named_parameters(), decay=0.5, start_update=0)
    ema.update(0)
    run_update(network, part_of(batch(8), rank))
    torch.optim.SGD(network.parameters(), lr=1.0).step()
    ema.update(1)
    same = all(
        isinstance(shadow, DTensor) and isinstance(parameter, DTensor) and shadow.placements == parameter.placements
        for shadow, parameter in zip(ema.shadow.values(), network.parameters(), strict=True)
    )
    return same, full_tensors(ema.shadow)


def test_the_average_of_a_sharded_network_is_sharded_alike_and_equals_the_plain_one(two_ranks: Ranks) -> None:
    expected, step = Network(), one_process(PLAIN)
    for same, average in two_ranks.run(averaged):
        assert same
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(average[name], parameter.detach() - 0.5 * step[name], rtol=1e-6, atol=1e-7)


def test_one_rank_needs_no_mesh_and_wrong_groups_are_refused() -> None:
    assert device_mesh(1, "cpu") is None
    for world_size, group in ((4, 3), (4, 8), (4, -1), (1, 2)):
        with pytest.raises(ValueError, match=f"train.shard_group = {group}"):
            device_mesh(world_size, "cpu", group)
    with pytest.raises(ValueError, match="process group"):
        device_mesh(2, "cpu")
    with pytest.raises(ValueError, match="precision.param = 'float16'"):
        Precision(param="float16")  # type: ignore[arg-type]


def placements(rank: int, shard_group: int) -> list[str]:
    parameter = next(build(PLAIN, 2, shard_group=shard_group).parameters())
    assert isinstance(parameter, DTensor)
    return [repr(parameter.placements)]


def test_a_shard_group_shards_inside_and_replicates_beyond(two_ranks: Ranks) -> None:
    assert two_ranks.run(placements, 2) == [[repr((Shard(0),))]] * 2
    assert two_ranks.run(placements, 1) == [[repr((Replicate(), Shard(0)))]] * 2
