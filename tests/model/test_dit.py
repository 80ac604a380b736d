"""The causal network: diffusers' own function without a cache, the block-causal one through it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.model.attention import BlockCausal, stage0_mask
from diagonal.model.cache import CacheBatch
from diagonal.model.dit import CausalWan, timestep
from tests.networks import (
    CHANNELS,
    TEXT_DIM,
    TEXT_TOKENS,
    begun,
    caches_for,
    draw,
    small_causal,
    small_config,
    small_wan,
)

CONFIG = small_config()
LEVELS = (1.0, 0.9375, 0.625, 0.35714287, 0.1, 0.8, 0.5, 0.3, 0.7)


def latents_of(chunks: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(*CONFIG.geometry.frames_shape(3 * chunks, batch), seed=chunks, dtype=dtype)


def text_of(batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(batch, TEXT_TOKENS, TEXT_DIM, seed=3, dtype=dtype)


def levels_of(chunks: int, batch: int = 1) -> Tensor:
    """Another level for each chunk, `[b, f]`."""
    return torch.tensor(LEVELS[:chunks], dtype=torch.float64).repeat_interleave(3).expand(batch, -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_without_a_mask_our_forward_is_diffusers_own(dtype: torch.dtype, tolerance: float, float64_stays: None) -> None:
    wan, ours = small_wan(layers=3).to(dtype), small_causal(layers=3, dtype=dtype)
    x, text, level = latents_of(3, 2, dtype), text_of(2, dtype), torch.tensor([0.9375, 0.35714287])
    with torch.no_grad():
        theirs = wan(x, timestep(level), text).sample
        mine = ours(x, level[:, None].expand(-1, 9), text)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
    assert theirs.std() > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_levels_by_chunk_are_diffusers_timesteps_by_token(
    dtype: torch.dtype, tolerance: float, float64_stays: None
) -> None:
    wan, ours = small_wan(layers=3).to(dtype), small_causal(layers=3, dtype=dtype)
    x, text, level = latents_of(3, 2, dtype), text_of(2, dtype), levels_of(3, 2)
    by_token = timestep(level).repeat_interleave(CONFIG.geometry.frame_tokens, dim=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, level, text), wan(x, by_token, text).sample, rtol=0, atol=tolerance)


def test_gradients_are_diffusers_own(float64_stays: None) -> None:
    wan, ours = small_wan().double(), small_causal(dtype=torch.float64)
    x, text, level = latents_of(2), text_of(), torch.tensor([0.625])
    wan(x, timestep(level), text).sample.square().mean().backward()
    ours(x, level[:, None].expand(-1, 6), text).square().mean().backward()
    theirs = dict(wan.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-13, msg=name)


def test_a_folder_that_diffusers_wrote_loads_under_the_same_names(tmp_path: Path) -> None:
    wan = small_wan(layers=3)
    wan.save_pretrained(tmp_path)
    ours = CausalWan.from_pretrained(tmp_path)
    mine, theirs = ours.state_dict(), wan.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    x, text, level = latents_of(2, 1, torch.float32), text_of(1, torch.float32), torch.tensor([0.5])
    with torch.no_grad():
        expected = wan(x, timestep(level), text).sample
        torch.testing.assert_close(ours(x, level[:, None].expand(-1, 6), text), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "chunks"), [(12, 4), (21, 7)])
def test_cached_chunk_by_chunk_equals_the_one_pass_mask_while_nothing_is_evicted(
    window: int, chunks: int, float64_stays: None
) -> None:
    config = small_config(f"cache.window_frames={window}")
    network = small_causal(layers=3, dtype=torch.float64)
    x, text, level = latents_of(chunks, 2), text_of(2), levels_of(chunks, 2)
    mask = BlockCausal(chunks, config.geometry.chunk_tokens)
    with torch.no_grad():
        whole = network(x, level, text, mask=mask)
        parts = run_cached(network, config, x, level, text, chunks)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
    assert (whole[:, :, :3] - network(x, level, text)[:, :, :3]).abs().max() > 1e-3, "the mask must matter"


@pytest.mark.parametrize("sink", [0, 3, 6])
def test_cached_chunks_equal_the_mask_at_window_positions_whatever_is_evicted(sink: int, float64_stays: None) -> None:
    config, chunks = small_config(f"cache.sink_frames={sink}"), 7
    network = small_causal(layers=3, dtype=torch.float64)
    x, text, level = latents_of(chunks, 2), text_of(2), levels_of(chunks, 2)
    with torch.no_grad():
        masks = (
            stage0_mask(config.with_settings([f"ode_init.sink_positions={one}"])) for one in ("window", "absolute")
        )
        window, absolute = (network(x, level, text, mask=mask) for mask in masks)
        parts = torch.cat(run_cached(network, config, x, level, text, chunks), dim=2)
    torch.testing.assert_close(parts, window, rtol=0, atol=1e-12)
    assert torch.equal(window, absolute) == (sink == 0), "without a sink nothing lies far away"
    assert torch.equal(window[:, :, :12], absolute[:, :, :12])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_after_eviction_a_chunk_sees_the_kept_keys_at_their_places_in_the_window(
    batch: int, float64_stays: None
) -> None:
    chunks = 9
    network, wan = small_causal(layers=3, dtype=torch.float64), small_wan(layers=3).double()
    x, text, level = latents_of(chunks, batch), text_of(batch), levels_of(chunks, batch)
    with torch.no_grad():
        parts = run_cached(network, CONFIG, x, level, text, chunks)
        expected = run_reference(wan, x, level, text, kept=lambda c: [0, *range(max(1, c - 2), c)] if c else [])
        everything = run_reference(wan, x, level, text, kept=lambda c: list(range(c)))
    for chunk in range(chunks):
        torch.testing.assert_close(parts[chunk], expected[chunk], rtol=0, atol=1e-12, msg=f"chunk {chunk}")
    assert all(torch.equal(expected[c], everything[c]) for c in range(4))
    assert all((expected[c] - everything[c]).abs().max() > 1e-4 for c in range(4, chunks)), "eviction must matter"


def test_a_chunk_depends_on_its_place_in_the_window_and_not_on_its_number(float64_stays: None) -> None:
    network = small_causal(dtype=torch.float64)
    outputs = []
    for numbers in ((0, 1, 2), (0, 500, 2000)):
        (cache,) = caches_for(CONFIG, network)
        with torch.no_grad():
            for place, number in enumerate(numbers):
                x = draw(*CONFIG.geometry.chunk_shape(), seed=place, dtype=torch.float64)
                out = network(x, torch.full((1, 3), 0.5), text_of(), cache=begun(number, cache), write=True)
        outputs.append(out)
    assert torch.equal(*outputs)


def test_the_cache_is_written_only_where_asked_and_only_on_the_current_page() -> None:
    network = small_causal()
    (cache,) = caches_for(CONFIG, network)
    x, text, level = latents_of(1, 1, torch.float32), text_of(1, torch.float32), torch.full((1, 3), 0.5)
    with torch.no_grad():
        network(x, level, text, cache=begun(0, cache), write=True)
        before = cache.pool.keys.clone()
        network(x, level, text, cache=begun(1, cache))
        assert torch.equal(cache.pool.keys, before)
        network(x, level, text, cache=CacheBatch([cache]), write=True)
    changed = {page for page in range(cache.pool.pages) if not torch.equal(cache.pool.keys[:, page], before[:, page])}
    assert changed == {cache.pages[1]}


def test_the_cache_holds_keys_after_their_norm_and_before_rotary() -> None:
    network = small_causal(layers=1)
    (cache,) = caches_for(CONFIG, network)
    seen: list[Tensor] = []
    network.blocks[0].attn1.norm_k.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(
            latents_of(1, 1, torch.float32),
            torch.full((1, 3), 0.5),
            text_of(1, torch.float32),
            cache=begun(0, cache),
            write=True,
        )
    assert torch.equal(cache.pool.keys[0, cache.pages[0]].flatten(1), seen[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_level_0_9375_reaches_the_time_embedding_as_timestep_937_5(
    dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    small_wan().save_pretrained(tmp_path)
    network = CausalWan.from_pretrained(tmp_path, torch_dtype=dtype).eval()
    exact = CausalWan.from_pretrained(tmp_path).eval()
    seen: list[Tensor] = []
    embedder = network.condition_embedder
    embedder.timesteps_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    level = torch.tensor([[1.0, 0.9375, 0.5 / 1.4]])
    x = draw(1, CHANNELS, 3, 4, 6).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity = network(x, level, text_of(1, dtype))
        embedding = network._time(level)[0]
    assert seen[0].dtype == torch.float32
    assert seen[0][:2].tolist() == [1000.0, 937.5] and abs(float(seen[0][2]) - 357.142857) < 1e-4
    with torch.no_grad():
        assert torch.equal(embedding, exact._time(level)[0]), "the time embedding is the float32 network's own"
    assert velocity.dtype == embedding.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_modulated_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    small_wan().save_pretrained(tmp_path)
    network = CausalWan.from_pretrained(tmp_path, torch_dtype=dtype).eval()
    seen: list[tuple[torch.dtype, ...]] = []

    def note(module: Any, inputs: Sequence[Any]) -> None:
        seen.append((inputs[2].dtype, module.scale_shift_table.dtype, inputs[3][0].dtype))

    for block in network.blocks:
        block.register_forward_pre_hook(note)
    with torch.no_grad():
        network(latents_of(1, 1, dtype), torch.full((1, 3), 0.9375), text_of(1, dtype))
    assert seen == [(torch.float32,) * 3] * 2


def test_the_timestep_is_1000_times_the_level_in_float32() -> None:
    levels = torch.tensor([0.0, 0.625, 0.9375, 1.0], dtype=torch.float64)
    assert timestep(levels).tolist() == [0.0, 625.0, 937.5, 1000.0]
    assert timestep(levels).dtype == timestep(levels.bfloat16()).dtype == torch.float32


def test_diffusers_finds_our_blocks_where_it_compiles_and_places_blocks_by_name() -> None:
    names = {type(block).__name__ for block in small_causal().blocks}
    assert names == set(CausalWan._repeated_blocks) == set(CausalWan._no_split_modules)


def test_building_a_network_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(FieldError, match="transformer.patch_size"):
        CausalWan(patch_size=(2, 2, 2), num_layers=1, num_attention_heads=1, attention_head_dim=12)
    with pytest.raises(FieldError, match="transformer.image_dim"):
        CausalWan(image_dim=8, num_layers=1, num_attention_heads=1, attention_head_dim=12)


def run_cached(network: CausalWan, config: Config, x: Tensor, level: Tensor, text: Tensor, chunks: int) -> list[Tensor]:
    """Velocity of each chunk, through the cache."""
    caches = caches_for(config, network, len(x))
    return [
        network(x[:, :, s : s + 3], level[:, s : s + 3], text, cache=begun(s // 3, *caches), write=True)
        for s in range(0, 3 * chunks, 3)
    ]


def run_reference(wan: WanTransformer3DModel, x: Tensor, level: Tensor, text: Tensor, kept: Any) -> list[Tensor]:
    """The same by diffusers' own forward of one chunk, with a self-attention that keeps its own books."""
    frame_tokens, height, width = CONFIG.geometry.frame_tokens, 2, 3
    books = [Bookkeeping(wan, height, width, kept) for _ in wan.blocks]
    for block, book in zip(wan.blocks, books, strict=True):
        block.attn1.set_processor(book)
    outputs = []
    for start in range(0, x.shape[2], 3):
        for book in books:
            book.chunk = start // 3
        by_token = timestep(level[:, start : start + 3]).repeat_interleave(frame_tokens, dim=1)
        outputs.append(wan(x[:, :, start : start + 3], by_token, text).sample)
    return outputs


class Bookkeeping:
    """Self-attention of one layer over the keys of `kept(chunk)` and its own, placed one after another."""

    def __init__(self, wan: WanTransformer3DModel, height: int, width: int, kept: Any) -> None:
        self.wan, self.height, self.width, self.kept = wan, height, width, kept
        self.chunk = -1
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        heads = attn.heads
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (heads, -1))
        self.stored[self.chunk] = key, attn.to_v(hidden_states).unflatten(2, (heads, -1))
        chunks = [*self.kept(self.chunk), self.chunk]
        keys = torch.cat([self.turn(self.stored[c][0], place) for place, c in enumerate(chunks)], dim=1)
        values = torch.cat([self.stored[c][1] for c in chunks], dim=1)
        scores = torch.einsum("bqhn,bkhn->bhqk", self.turn(query, len(chunks) - 1), keys) / query.shape[-1] ** 0.5
        mixed = torch.einsum("bhqk,bkhn->bqhn", scores.softmax(-1), values)
        return attn.to_out[0](mixed.flatten(2))

    def turn(self, x: Tensor, place: int) -> Tensor:
        """Rotate the tokens of the chunk at that place of the window, one token at a time."""
        rope, tokens = self.wan.rope, []
        sizes = [rope.t_dim, rope.h_dim, rope.w_dim]
        cosines, sines = rope.freqs_cos.split(sizes, dim=1), rope.freqs_sin.split(sizes, dim=1)
        for token in range(x.shape[1]):
            frame, rest = divmod(token, self.height * self.width)
            at = (3 * place + frame, *divmod(rest, self.width))
            cosine = torch.cat([table[position] for table, position in zip(cosines, at, strict=True)])
            sine = torch.cat([table[position] for table, position in zip(sines, at, strict=True)])
            across = torch.stack((-x[:, token, :, 1::2], x[:, token, :, 0::2]), dim=-1).flatten(-2)
            tokens.append(x[:, token] * cosine + across * sine)
        return torch.stack(tokens, dim=1)
