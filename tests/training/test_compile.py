"""Compiled blocks: one graph each, the same numbers and names, with recomputation and with sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagonal.training.parallel import (
    ParallelPlan,
    Precision,
    device_mesh,
    finish_gradients,
    full_tensors,
    parallelize,
    rollout_scope,
)
from tests.networks import begun, caches_for, draw, small_causal, small_config, small_wan
from tests.training.ranks import Ranks

BACKEND = "aot_eager"  # captures and differentiates graphs as the default back end does, and compiles no C++
CONFIG = small_config()
FLOAT32, NARROW = Precision(), Precision("bfloat16")
CHUNKS = 2


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch.compiler.reset()


def plan_of(precision: Precision, compiled: bool) -> ParallelPlan:
    return ParallelPlan(precision, checkpoint_blocks=True, compile=compiled, compile_backend=BACKEND)


def causal_update(plan: ParallelPlan, world_size: int = 1) -> tuple[list[Tensor], dict[str, Tensor], list[str]]:
    """Outputs, gradients and names of a rollout of chunks, each with a forward without gradient and one with."""
    network = small_causal()
    parallelize(network, network.blocks, device_mesh(world_size, "cpu"), plan, trainable=True)
    caches = caches_for(CONFIG, network)
    outputs = []
    with rollout_scope(network):
        for chunk in range(CHUNKS):
            outputs += list(run_chunk(network, caches, chunk))
        torch.stack(outputs[1::2]).square().mean().backward()
        finish_gradients(network)
    gradients = full_tensors({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    return [output.detach() for output in outputs], gradients, [name for name, _ in network.named_parameters()]


def run_chunk(network: nn.Module, caches: Any, chunk: int) -> tuple[Tensor, Tensor]:
    x, text = draw(*CONFIG.geometry.chunk_shape(), seed=chunk), draw(1, 6, 16, seed=9)
    level = torch.full((1, 3), 0.9375)
    with torch.no_grad():
        first = network(x, level, text, cache=begun(chunk, *caches), write=True)
    return first, network(x, level, text, cache=begun(chunk, *caches))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_compiled_recomputed_bfloat16_rollout_equals_the_eager_one() -> None:
    precision, tolerance = NARROW, 0.02
    torch._dynamo.utils.counters.clear()
    outputs, gradients, names = causal_update(plan_of(precision, compiled=True))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2 * CHUNKS, "one for each context length and mode, shared by the blocks"
    assert not torch._dynamo.utils.counters["graph_break"]
    expected_outputs, expected, expected_names = causal_update(plan_of(precision, compiled=False))
    assert names == expected_names == [name for name, _ in small_causal().named_parameters()]
    for output, wanted in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (gradients[name] - wanted).norm() <= tolerance * wanted.norm() + 1e-6, name


def sharded_update(rank: int) -> tuple[list[Tensor], dict[str, Tensor], list[str]]:
    return causal_update(plan_of(FLOAT32, compiled=True), world_size=2)


@pytest.mark.slow
def test_compiled_recomputed_and_sharded_over_two_ranks_it_is_the_eager_network_on_one(two_ranks: Ranks) -> None:
    expected_outputs, expected, names = causal_update(plan_of(FLOAT32, compiled=False))
    for outputs, gradients, found in two_ranks.run(sharded_update, deadline_s=280.0):
        assert found == names
        for output, wanted in zip(outputs, expected_outputs, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
        for name, wanted in expected.items():
            torch.testing.assert_close(gradients[name], wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [pytest.param(True, marks=pytest.mark.nightly), False])
def test_diffusers_own_blocks_compile_whole(trainable: bool) -> None:
    results = []
    for compiled in (True, False):
        network = small_wan()
        parallelize(network, network.blocks, None, plan_of(NARROW, compiled), trainable=trainable)
        x, text = draw(1, 4, 3, 4, 6), draw(1, 6, 16)
        output = network(x, torch.full((1,), 937.5), text.to(network.dtype)).sample.float()
        if trainable:
            output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 1 + trainable * len(list(network.parameters()))
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 0.02 * wanted.norm() + 1e-6


class Breaks(nn.Module):
    """A block whose graph cannot be whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if float(x.sum()) > 0 else x


def test_a_block_whose_graph_breaks_is_an_error() -> None:
    block = Breaks()
    plan = ParallelPlan(compile=True, compile_backend=BACKEND)
    parallelize(block, [block], None, plan, trainable=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        block(torch.ones(2))
