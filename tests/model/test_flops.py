"""Counted operations are those of torch's own counter, and the figures of the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diagonal.config import Config
from diagonal.diffusion.rollout import rollout
from diagonal.diffusion.teacher import velocity
from diagonal.model.architecture import TransformerLayout
from diagonal.model.attention import BlockCausal
from diagonal.model.flops import chunk_flops, clip_flops, forward_flops, rollout_flops, update_flops
from tests.networks import WAN_1_3B, WAN_14B, begun, caches_for, draw, small_causal, small_config, small_wan

CONFIG = small_config()
SMALL = TransformerLayout.of(small_wan().config)
TEXT = draw(1, CONFIG.model.text_tokens, SMALL.text_dim)
WAN = TransformerLayout.of(WAN_1_3B)
REAL = Config.from_preset("wan-1.3b")


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused one is not counted
        run()
    return int(counter.get_total_flops())


def test_a_forward_of_diffusers_network_is_torchs_count_and_its_backward_twice_that() -> None:
    network, x, level = small_wan(), draw(*CONFIG.geometry.clip_shape()), torch.tensor([0.5])
    with torch.no_grad():
        forward = counted(lambda: velocity(network, x, level, TEXT))
    assert clip_flops(SMALL, CONFIG) == pytest.approx(forward, rel=1e-3)
    both = counted(lambda: velocity(network, x, level, TEXT).square().mean().backward())
    assert 3 * clip_flops(SMALL, CONFIG) == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize("chunk", [0, 1, 3, 6])
def test_a_chunks_forward_is_torchs_count_with_its_window_of_keys(chunk: int) -> None:
    network, x, level = small_causal(), draw(*CONFIG.geometry.chunk_shape()), torch.full((1, 3), 0.5)
    (cache,) = caches_for(CONFIG, network)
    for earlier in range(chunk):
        cache.begin(earlier)
    batch = begun(chunk, cache)
    with torch.no_grad():
        assert chunk_flops(SMALL, CONFIG, chunk) == pytest.approx(
            counted(lambda: network(x, level, TEXT, cache=batch)), rel=1e-3
        )


@pytest.mark.slow
def test_a_rollout_and_stage_0_are_torchs_count() -> None:
    network, geometry = small_causal(), CONFIG.geometry
    with torch.no_grad():
        found = counted(lambda: rollout(network, CONFIG, TEXT, [0]))
    assert rollout_flops(SMALL, CONFIG) == pytest.approx(found, rel=1e-3)
    pattern = BlockCausal(geometry.clip_chunks, geometry.chunk_tokens, 4, 1)
    x, level = draw(*geometry.clip_shape()), torch.full((1, geometry.clip_frames), 0.5)
    both = counted(lambda: network(x, level, TEXT, mask=pattern).square().mean().backward())
    assert update_flops(CONFIG, SMALL, SMALL, 0).mean == pytest.approx(both, rel=0.01)


def test_forwards_of_a_chunk_are_the_methods_table() -> None:
    tera = [16.19, 20.22, 24.26, 28.30, 32.33, 36.37, 40.41]
    everything = REAL.with_settings(["cache.window_frames=21"])
    for chunk, expected in enumerate(tera):
        assert chunk_flops(WAN, everything, chunk) / 1e12 == pytest.approx(expected, rel=0.01)
        assert chunk_flops(WAN, REAL, chunk) == chunk_flops(WAN, everything, min(chunk, 3))


@pytest.mark.parametrize(
    ("steps", "context", "expected"),
    [
        ("4322222", "reuse", 400),
        ("5432222", "reuse", 460),
        ("4444444", "reuse", 695),
        ("4322222", 0.0, 574),
        ("4444444", 0.0, 869),
    ],
)
def test_rollouts_are_the_methods_table(steps: str, context: Any, expected: float) -> None:
    config = REAL.with_settings([f"schedule.steps={steps}", f"schedule.context={context}"])
    assert rollout_flops(WAN, config) / 1e12 == pytest.approx(expected, rel=0.01)


def test_whole_forwards_and_updates_are_the_methods_figures() -> None:
    large = TransformerLayout.of(WAN_14B)
    assert clip_flops(WAN, REAL) / 1e12 == pytest.approx(283, rel=0.01)
    assert clip_flops(large, REAL) / 1e12 == pytest.approx(1678, rel=0.01)
    # The method's means are of the public code, which spends a pass a chunk on the context; its reference spends none.
    public = REAL.with_settings(["schedule.context=0.101"])
    reference = rollout_flops(WAN, REAL.with_settings(["schedule.steps=4444444"])) / 5
    for teacher, expected in ((WAN, 1.93), (large, 2.49)):
        assert (update_flops(public, WAN, teacher, 2).mean + reference) / 1e15 == pytest.approx(expected, rel=0.01)
    for teacher, expected in ((WAN, 2.14), (large, 2.69)):
        assert update_flops(public, WAN, teacher, 1).mean / 1e15 == pytest.approx(expected, rel=0.01)
    assert update_flops(REAL, WAN, WAN, 2).mean / 1e15 == pytest.approx(1.57, rel=0.01), "the context is reused"


def test_stage_2_pays_for_its_reference_only_when_a_loss_asks_for_it() -> None:
    asks = REAL.with_settings(["distill.loss.flow_regression=1"])
    paid = update_flops(asks, WAN, WAN, 2).generator - update_flops(REAL, WAN, WAN, 2).generator
    assert paid == rollout_flops(WAN, REAL.with_settings(["schedule.steps=4"]))
    assert update_flops(REAL, WAN, WAN, 2).critic == update_flops(asks, WAN, WAN, 2).critic


def test_longer_rollouts_cost_the_mean_of_their_lengths() -> None:
    longer = REAL.with_settings(["distill.rollout_chunks=9"])
    whole = [rollout_flops(WAN, REAL, chunks=chunks) for chunks in (7, 8, 9)]
    more = update_flops(longer, WAN, WAN, 2).generator - update_flops(REAL, WAN, WAN, 2).generator
    assert more == sum(whole) // 3 - whole[0]


def test_queries_keys_and_text_enter_as_products() -> None:
    base = forward_flops(WAN, 100, 100, 10)
    assert forward_flops(WAN, 100, 150, 10) - base == WAN.layers * 4 * WAN.hidden * 100 * 50
