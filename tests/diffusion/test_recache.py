"""The re-cache: bit-exact before the first eviction, close after it, and new where the prompt is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagonal.diffusion.rollout import KeptChunk, recache
from diagonal.model.cache import KVCache
from diagonal.model.dit import CausalWan
from tests.diffusion.chunks import CONFIG, kv_of, run, text_of
from tests.networks import caches_for, small_causal, small_config


def generated(
    chunks: int, *, context: Any = None, window: int = 12, clean_newest: bool = False
) -> tuple[CausalWan, KVCache, list[KeptChunk]]:
    """A stream of so many chunks, and the inputs of the forwards that wrote what its cache still holds."""
    network, config = small_causal(layers=3), small_config(f"cache.window_frames={window}")
    (cache,) = caches_for(config, network)
    done = [run(network, cache, chunk, context=context, clean_newest=clean_newest) for chunk in range(chunks)]
    kept = [KeptChunk(c, done[c].written[0], done[c].written_level, done[c].refreshed) for c in cache.chunks]
    return network, cache, kept


@pytest.mark.parametrize("clean_newest", [False, True])
@pytest.mark.parametrize("context", [None, 0.0, 0.25])
@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_before_the_first_eviction_a_recache_reproduces_the_cache_bit_for_bit(
    chunks: int, context: Any, clean_newest: bool
) -> None:
    network, cache, kept = generated(chunks, context=context, clean_newest=clean_newest)
    before = kv_of(cache)
    cache.pool.keys.fill_(9.0)
    cache.pool.values.fill_(9.0)
    assert recache(network, cache, kept, text_of()) == chunks
    assert cache.chunks == tuple(range(chunks)) and torch.equal(kv_of(cache), before)


def test_a_recache_elsewhere_lands_on_the_same_bits() -> None:
    network, cache, kept = generated(3)
    (other,) = caches_for(CONFIG, network)
    other.pool.take()  # so that its pages are others
    recache(network, other, kept, text_of())
    assert torch.equal(kv_of(other), kv_of(cache)) and other.pages != cache.pages


def test_after_eviction_a_recache_is_exact_in_the_first_layer_and_close_in_the_others() -> None:
    """The kept chunks once attended to chunks that are gone: 0.018 of the K/V here, stated at 0.05."""
    network, cache, kept = generated(8)
    before = kv_of(cache)
    assert recache(network, cache, kept, text_of()) == 4 and cache.chunks == (0, 5, 6, 7)
    after = kv_of(cache)
    assert torch.equal(after[:, 0], before[:, 0]), "keys and values of the first layer see no other chunk"
    assert torch.equal(after[:, :, 0], before[:, :, 0]), "the sink saw nothing but itself"
    seam = float((after - before)[:, 1:].norm() / before[:, 1:].norm())
    assert 0.0 < seam < 0.05, seam


def test_with_another_prompt_only_the_layers_after_the_first_change() -> None:
    network, cache, kept = generated(3)
    before = kv_of(cache)
    recache(network, cache, kept, text_of(seed=2))
    after = kv_of(cache)
    assert torch.equal(after[:, 0], before[:, 0])
    for layer in (1, 2):
        for chunk in range(3):
            assert (after[:, layer, chunk] - before[:, layer, chunk]).abs().max() > 1e-3
    recache(network, cache, kept, text_of())
    assert torch.equal(kv_of(cache), before), "and back again"


def test_a_recache_takes_no_gradient_and_frees_what_it_replaces() -> None:
    network, cache, kept = generated(8)
    recache(network, cache, kept[:2], text_of())
    assert cache.pool.bytes_in_use == 2 * cache.pool.page_bytes and not cache.pool.keys.requires_grad
