"""Rotary positions, the block-causal pattern and the two ways to compute attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diagonal.errors import FieldError
from diagonal.model.attention import BlockCausal, attend, plain_attention, rotary_table, rotate
from tests.networks import draw

FRAMES, HEIGHT, WIDTH, HEAD = 5, 2, 3, 16


def dense_mask(pattern: BlockCausal) -> Tensor:
    """The pattern as a boolean `[t, t]`, from its definition."""
    chunk = torch.arange(pattern.chunks)
    query, key = chunk[:, None], chunk[None, :]
    allowed = key <= query
    if pattern.window_chunks is not None:
        newest = key > query - (pattern.window_chunks - pattern.sink_chunks)
        allowed &= (key < pattern.sink_chunks) | newest
    return allowed.repeat_interleave(pattern.chunk_tokens, 0).repeat_interleave(pattern.chunk_tokens, 1)


def rope() -> WanRotaryPosEmbed:
    return WanRotaryPosEmbed(HEAD, (1, 2, 2), 64)


def test_the_table_is_diffusers_own_at_half_the_columns() -> None:
    cosine, sine = rotary_table(rope(), FRAMES, HEIGHT, WIDTH)
    their_cosine, their_sine = rope()(torch.zeros(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH))
    assert torch.equal(cosine, their_cosine[..., 0::2]) and torch.equal(sine, their_sine[..., 1::2])
    assert cosine.shape == (1, FRAMES * HEIGHT * WIDTH, 1, HEAD // 2)


def test_rotation_multiplies_pairs_of_channels_by_a_complex_phase() -> None:
    x = draw(2, FRAMES * HEIGHT * WIDTH, 3, HEAD, dtype=torch.float64)
    cosine, sine = (table.double() for table in rotary_table(rope(), FRAMES, HEIGHT, WIDTH))
    phase = torch.complex(cosine, sine)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * phase).flatten(-2)
    torch.testing.assert_close(rotate(x, (cosine, sine)), expected, rtol=0, atol=1e-15)


def test_scores_depend_on_the_distance_of_frames_alone() -> None:
    query, key = draw(1, 1, 1, HEAD, seed=1), draw(1, 1, 1, HEAD, seed=2)
    cosine, sine = rotary_table(rope(), FRAMES, 1, 1)

    def score(at: int, other: int) -> float:
        def here(position: int) -> tuple[torch.Tensor, torch.Tensor]:
            return cosine[:, position : position + 1], sine[:, position : position + 1]

        return float((rotate(query, here(at)) * rotate(key, here(other))).sum())

    assert score(3, 1) == pytest.approx(score(4, 2), abs=1e-5) == pytest.approx(score(2, 0), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_rotation_keeps_the_type_that_it_was_given() -> None:
    cosine, sine = rotary_table(rope(), 1, 1, 1)
    assert rotate(draw(1, 1, 1, HEAD, dtype=torch.bfloat16), (cosine, sine)).dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_gradients_on_the_cpu_is_the_fused_one(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    query, key, value = (draw(2, 6, 3, 8, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3))
    mask = BlockCausal(3, 2) if masked else None
    plain = attend(query, key, value, mask)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    dense = dense_mask(mask) if mask else None
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-14)
    seed = draw(*plain.shape, seed=9, dtype=torch.float64)
    ours = torch.autograd.grad(plain, (query, key, value), seed)
    theirs = torch.autograd.grad(fused, (query, key, value), seed)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(attend(query, key, value, mask), plain, rtol=0, atol=1e-14)


WINDOWS = [(None, 0), (4, 1), (4, 0), (3, 2), (1, 0), (9, 1)]


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
def test_the_mask_lets_a_token_see_its_own_chunk_the_sink_and_the_newest(window: int | None, sink: int) -> None:
    chunks, tokens = 7, 3
    pattern = BlockCausal(chunks, tokens, window, sink)
    mask = dense_mask(pattern)
    assert mask.shape == (chunks * tokens, chunks * tokens)
    for row in range(chunks * tokens):
        for column in range(chunks * tokens):
            query, key = row // tokens, column // tokens
            others = [c for c in range(query) if c >= sink]
            room = chunks if window is None else window - min(sink, query) - 1
            kept = {query, *range(min(sink, query)), *others[max(0, len(others) - room) :]}
            assert bool(mask[row, column]) == (key in kept), (query, key)


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
def test_the_spans_of_a_chunk_are_the_columns_of_its_row_in_the_mask(window: int | None, sink: int) -> None:
    pattern = BlockCausal(7, 3, window, sink)
    for chunk in range(7):
        row = torch.zeros(pattern.tokens, dtype=torch.bool)
        spans = pattern.spans(chunk)
        for first, end in spans:
            assert not row[first:end].any(), "no key is counted twice"
            row[first:end] = True
        assert torch.equal(row, dense_mask(pattern)[chunk * 3]) and list(spans) == sorted(spans)
    assert max(len(pattern.spans(chunk)) for chunk in range(7)) == (2 if window and 0 < sink and window < 7 else 1)


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
@pytest.mark.parametrize("gradient", [True, False])
def test_chunkwise_attention_is_attention_under_the_dense_mask(
    window: int | None, sink: int, gradient: bool, float64_stays: None
) -> None:
    pattern = BlockCausal(7, 5, window, sink)
    query, key, value = (draw(2, 35, 3, 8, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3))
    by_head = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    expected = plain_attention(*by_head, dense_mask(pattern)).transpose(1, 2)
    with torch.set_grad_enabled(gradient):
        found = attend(query, key, value, pattern)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    if gradient:
        seed = draw(*found.shape, seed=9, dtype=torch.float64)
        ours, theirs = (torch.autograd.grad(y, (query, key, value), seed) for y in (found, expected))
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gradient", [True, False])
def test_no_tensor_of_queries_by_keys_of_the_whole_clip_is_made(gradient: bool) -> None:
    pattern = BlockCausal(7, 32, 4, 1)
    x = draw(1, pattern.tokens, 1, 8).requires_grad_()
    with SizesSeen() as sizes, torch.set_grad_enabled(gradient):
        y = attend(x, x, x, pattern)
        if gradient:
            y.sum().backward()
    assert sizes.largest <= 32 * 4 * 32 < pattern.tokens**2


class SizesSeen(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation gave."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, tuple | list) else (given,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return given


def test_patterns_that_make_no_sense_and_clips_of_another_length_are_refused_by_name() -> None:
    for wrong in ((0, 3, None, 0), (7, 0, None, 0), (7, 3, 0, 0), (7, 3, 4, 4), (7, 3, 4, -1)):
        with pytest.raises(FieldError, match="block_causal"):
            BlockCausal(*wrong)
    x = draw(1, 20, 1, 8)
    with pytest.raises(FieldError, match=r"block_causal.tokens = 21: .* = 20"):
        attend(x, x, x, BlockCausal(7, 3))
    with pytest.raises(FieldError, match=r"block_causal.window_positions"):
        attend(x, x, x, BlockCausal(4, 5, 3, 1, window_positions=True))
