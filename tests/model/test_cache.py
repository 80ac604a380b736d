"""K/V memory: pages are owned by the pool, the sink stays, the ring rolls, reading copies, nothing takes gradients."""

from __future__ import annotations

import pytest
import torch

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.model.cache import CacheBatch, KVCache, KVPool, PoolExhaustedError
from tests.networks import draw

LAYERS, HEADS, WIDTH, TOKENS = 2, 3, 4, 5


def pool_of(pages: int, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(layers=LAYERS, heads=HEADS, head_dim=WIDTH, page_tokens=TOKENS, pages=pages, dtype=dtype)


def write(cache: KVCache, chunk: int) -> torch.Tensor:
    """Make that chunk the newest and store numbers that name it; returns its keys of layer 0."""
    cache.begin(chunk)
    for layer in range(LAYERS):
        key = draw(1, TOKENS, HEADS, WIDTH, seed=100 * chunk + layer)
        CacheBatch([cache]).write(layer, key, -key)
    return draw(1, TOKENS, HEADS, WIDTH, seed=100 * chunk)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_equal_the_formula_to_the_byte(dtype: torch.dtype, size: int) -> None:
    pool = pool_of(7, dtype)
    page = 2 * LAYERS * TOKENS * HEADS * WIDTH * size
    cache = KVCache(pool, window_chunks=4, sink_chunks=1)
    assert (pool.page_bytes, pool.capacity_bytes, pool.bytes_in_use) == (page, 7 * page, 0)
    assert pool.keys.nbytes + pool.values.nbytes == pool.capacity_bytes
    for chunk in range(6):
        cache.begin(chunk)
        assert cache.bytes_in_use == pool.bytes_in_use == min(chunk + 1, 4) * page
    cache.close()
    assert cache.bytes_in_use == pool.bytes_in_use == 0


def test_wans_window_of_12_frames_takes_3_4505_gb_in_bfloat16() -> None:
    config = Config.from_preset("wan-1.3b")
    window = config.cache.window_frames // config.geometry.chunk_frames
    pool = KVPool(
        layers=30,
        heads=12,
        head_dim=128,
        page_tokens=config.geometry.chunk_tokens,
        pages=window,
        dtype=torch.bfloat16,
        device="meta",
    )
    assert pool.capacity_bytes == 2 * 30 * 1536 * 2 * 1560 * 12 == 3_450_470_400


def test_a_page_is_handed_out_once_and_taken_back_once() -> None:
    pool = pool_of(3)
    taken = {pool.take() for _ in range(3)}
    assert taken == {0, 1, 2} and pool.free_pages == 0
    with pytest.raises(PoolExhaustedError, match="all 3 pages"):
        pool.take()
    pool.give_back(1)
    for page in (1, 3, -1):
        with pytest.raises(FieldError, match=f"page = {page}"):
            pool.give_back(page)
    assert pool.take() == 1


@pytest.mark.parametrize(("window", "sink"), [(4, 1), (4, 0), (7, 1), (5, 2), (2, 1), (1, 0)])
def test_after_any_chunk_the_window_holds_the_sink_and_the_newest(window: int, sink: int) -> None:
    cache = KVCache(pool_of(window), window_chunks=window, sink_chunks=sink)
    for chunk in range(20):
        cache.begin(chunk)
        newest = range(max(sink, chunk - (window - sink) + 1), chunk + 1)
        assert cache.chunks == (*range(min(sink, chunk + 1)), *newest)[:window]
        assert len(set(cache.pages)) == len(cache.pages)


def test_the_sink_is_never_evicted_nor_written_over() -> None:
    cache = KVCache(pool_of(4), window_chunks=4, sink_chunks=1)
    first = write(cache, 0)
    for chunk in range(1, 12):
        newest = write(cache, chunk)
        keys, values = CacheBatch([cache]).context(0)
        assert torch.equal(keys[:, :TOKENS], first) and torch.equal(values[:, :TOKENS], -first)
        assert torch.equal(cache.pool.keys[0, cache.pages[-1]], newest[0])
    kept = torch.cat([draw(1, TOKENS, HEADS, WIDTH, seed=100 * chunk) for chunk in (0, 9, 10)], dim=1)
    assert cache.chunks == (0, 9, 10, 11)
    assert torch.equal(CacheBatch([cache]).context(0)[0], kept)


def test_beginning_the_newest_chunk_again_keeps_its_page() -> None:
    cache = KVCache(pool_of(4), window_chunks=4, sink_chunks=1)
    for chunk in (0, 1, 5):
        cache.begin(chunk)
        pages = cache.pages
        cache.begin(chunk)
        assert cache.pages == pages


@pytest.mark.parametrize("chunk", [1, 0, -1])
def test_a_chunk_before_the_newest_is_refused(chunk: int) -> None:
    cache = KVCache(pool_of(4), window_chunks=4, sink_chunks=1)
    with pytest.raises(FieldError, match="chunk = -1"):
        cache.begin(-1)
    cache.begin(2)
    with pytest.raises(FieldError, match=f"chunk = {chunk}: allowed is a chunk after 2"):
        cache.begin(chunk)


def test_without_recycling_no_page_is_used_twice_before_the_cache_is_closed() -> None:
    pool = pool_of(9)
    cache = KVCache(pool, window_chunks=4, sink_chunks=1, recycle=False)
    begun = []
    for chunk in range(9):
        cache.begin(chunk)
        begun.append(cache.pages[-1])
        assert cache.bytes_in_use == pool.bytes_in_use == (chunk + 1) * pool.page_bytes
    assert len(set(begun)) == 9 and cache.chunks == (0, 6, 7, 8)
    cache.close()
    assert pool.free_pages == 9


def test_with_recycling_a_stream_has_no_last_chunk() -> None:
    pool = pool_of(4)
    cache = KVCache(pool, window_chunks=4, sink_chunks=1)
    for chunk in range(1000):
        cache.begin(chunk)
    assert cache.chunks == (0, 997, 998, 999) and pool.free_pages == 0


def test_closing_twice_gives_each_page_back_once() -> None:
    pool = pool_of(4)
    cache = KVCache(pool, window_chunks=4, sink_chunks=1)
    cache.begin(0)
    cache.close()
    cache.close()
    assert pool.free_pages == 4 and cache.chunks == ()


@pytest.mark.parametrize("sink", [-1, 4, 5])
def test_a_sink_without_room_for_the_chunk_in_progress_is_refused(sink: int) -> None:
    with pytest.raises(FieldError, match=f"sink_chunks = {sink}: allowed is 0 to 3"):
        KVCache(pool_of(4), window_chunks=4, sink_chunks=sink)


def test_what_was_read_does_not_change_when_the_page_is_written_again() -> None:
    cache = KVCache(pool_of(4), window_chunks=4, sink_chunks=1)
    write(cache, 0)
    cache.begin(1)
    keys, values = CacheBatch([cache]).context(0)
    before = keys.clone(), values.clone()
    cache.pool.keys.fill_(9.0)
    cache.pool.values.fill_(9.0)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_the_cache_never_takes_part_in_gradients() -> None:
    cache = KVCache(pool_of(4), window_chunks=4, sink_chunks=1)
    cache.begin(0)
    key = draw(1, TOKENS, HEADS, WIDTH).requires_grad_()
    CacheBatch([cache]).write(0, 2 * key, 3 * key)
    cache.begin(1)
    keys, values = CacheBatch([cache]).context(0)
    assert torch.equal(keys, 2 * key) and torch.equal(values, 3 * key)
    assert not any(x.requires_grad for x in (cache.pool.keys, cache.pool.values, keys, values))


def test_sessions_at_different_chunks_read_and_write_their_own_pages() -> None:
    pool = pool_of(8)
    caches = [KVCache(pool, window_chunks=4, sink_chunks=1) for _ in range(2)]
    for chunk in range(3):
        write(caches[0], chunk)
    for chunk in range(10, 13):
        write(caches[1], chunk)
    batch = CacheBatch(caches)
    assert batch.context_chunks == 2
    keys, _ = batch.context(1)
    for row, chunks in enumerate([(0, 1), (10, 11)]):
        own = torch.cat([draw(1, TOKENS, HEADS, WIDTH, seed=100 * chunk + 1) for chunk in chunks], dim=1)
        assert torch.equal(keys[row], own[0])
    both = draw(2, TOKENS, HEADS, WIDTH, seed=5)
    batch.write(1, both, both)
    for row, cache in enumerate(caches):
        assert torch.equal(pool.keys[1, cache.pages[-1]], both[row])


def test_caches_of_unequal_length_or_not_begun_are_no_batch() -> None:
    pool = pool_of(8)
    long, short = (KVCache(pool, window_chunks=4, sink_chunks=1) for _ in range(2))
    with pytest.raises(FieldError, match=r"caches = \[0\]"):
        CacheBatch([short])
    short.begin(0)
    long.begin(0)
    long.begin(1)
    with pytest.raises(FieldError, match=r"caches = \[1, 2\]"):
        CacheBatch([long, short])
