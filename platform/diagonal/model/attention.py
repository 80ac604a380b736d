"""Attention pieces: rotary by frame position, the block-causal masks, and scaled dot-product attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def rotary_table(rope: WanRotaryPosEmbed, frames: int, token_height: int, token_width: int) -> Rotary:
    """Cosine and sine `[1, frames*height*width, 1, head_dim/2]` for frames at positions 0 .. frames-1."""
    widths = [rope.t_dim, rope.h_dim, rope.w_dim]
    grid = (frames, token_height, token_width)
    tables = []
    for table in (rope.freqs_cos, rope.freqs_sin):
        axes = table[:, 0::2].split([width // 2 for width in widths], dim=1)
        parts = []
        for axis, length in enumerate(grid):
            shape = [1, 1, 1, -1]
            shape[axis] = length
            parts.append(axes[axis][:length].view(shape).expand(*grid, -1))
        tables.append(torch.cat(parts, dim=-1).reshape(1, frames * token_height * token_width, 1, -1))
    return tables[0], tables[1]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate pairs of channels of `[b, t, heads, head_dim]` by the angles of `rotary`; keeps the dtype."""
    cosine, sine = rotary
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return rotated.flatten(-2).type_as(x)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over `[b, t, heads, head_dim]`; `mask` is boolean `[queries, keys]`, True where allowed.

    On CPU with gradients the plain product is used: the fused kernel's backward is several times slower there.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        return _plain_attention(query, key, value, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.float().softmax(-1).to(value.dtype) @ value


def block_causal_mask(
    chunks: int, chunk_tokens: int, *, window_chunks: int | None = None, sink_chunks: int = 0
) -> Tensor:
    """Boolean `[t, t]`, t = chunks*chunk_tokens: a token sees its own chunk and earlier ones; with a window, only the
    first `sink_chunks` and the newest, `window_chunks` in all with its own (stage 0; positions stay absolute)."""
    chunk = torch.arange(chunks)
    query, key = chunk[:, None], chunk[None, :]
    allowed = key <= query
    if window_chunks is not None:
        allowed &= (key < sink_chunks) | (key > query - (window_chunks - sink_chunks))
    return allowed.repeat_interleave(chunk_tokens, 0).repeat_interleave(chunk_tokens, 1)
