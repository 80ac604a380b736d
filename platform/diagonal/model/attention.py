"""Attention pieces: rotary by frame position, the block-causal pattern, and scaled dot-product attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import require

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


@dataclass(frozen=True)
class BlockCausal:
    """Which keys each chunk of a whole clip sees: its own, earlier ones; with a window, only the first `sink_chunks`
    and the newest, `window_chunks` in all with its own (stage 0).

    With `window_positions` the sink lies right before the newest, as in the cache of a stream, whatever the window left
    out between them; else at its place in the clip.

    A pattern instead of a `[t, t]` mask: of 32,760 tokens the boolean one is 1.07 GB, and keeps attention off the
    fused kernels that take none. `FieldError` when sink and window do not fit.
    """

    chunks: int
    chunk_tokens: int
    window_chunks: int | None = None
    sink_chunks: int = 0
    window_positions: bool = False

    def __post_init__(self) -> None:
        require(
            self.chunks >= 1 and self.chunk_tokens >= 1,
            "block_causal.chunks",
            (self.chunks, self.chunk_tokens),
            "at least one chunk of at least one token",
        )
        window = self.chunks if self.window_chunks is None else self.window_chunks
        require(
            0 <= self.sink_chunks < window,
            "block_causal.sink_chunks",
            self.sink_chunks,
            f"0 or more, below the window's chunks = {window}",
        )

    @property
    def tokens(self) -> int:
        return self.chunks * self.chunk_tokens

    def spans(self, chunk: int) -> tuple[tuple[int, int], ...]:
        """The keys that a chunk sees, as rising `(first, end)` tokens: one span, or the sink's and the newest's."""
        newest = 0
        if self.window_chunks is not None:
            newest = max(0, chunk + 1 - (self.window_chunks - self.sink_chunks))
        end = (chunk + 1) * self.chunk_tokens
        if newest <= self.sink_chunks:
            return ((0, end),)
        behind = (newest * self.chunk_tokens, end)
        return (behind,) if self.sink_chunks == 0 else ((0, self.sink_chunks * self.chunk_tokens), behind)


def stage0_mask(config: Config) -> BlockCausal:
    """What each chunk of a clip sees with the configured sink, window and positions (docs/method.md, context)."""
    geometry, chunk = config.geometry, config.geometry.chunk_frames
    return BlockCausal(
        geometry.clip_chunks,
        geometry.chunk_tokens,
        window_chunks=config.cache.window_frames // chunk,
        sink_chunks=config.cache.sink_frames // chunk,
        window_positions=config.ode_init.sink_positions == "window",
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockCausal | None = None, rotary: Rotary | None = None
) -> Tensor:
    """Softmax attention over `[b, t, heads, head_dim]`, of everything, or of what `mask` lets each chunk see; `rotary`
    is what query and key were turned by, needed by a mask with `window_positions`.

    Under a mask each query chunk is one fused call over exactly its keys: nothing is computed that the mask would
    throw away, no mask tensor exists, and any back end serves (forward and backward are exact). Chosen before
    FlexAttention, which needs compilation and wastes part of its 128-wide tiles where chunks of 4680 tokens end.

    Memory on CUDA: no `t x t` product exists in either direction. Saved for backward are views of query, key and value,
    the output and one float32 a query and head, and copies of key and value only where the window left the sink behind:
    at 832x480 with window 12 and sink 3, 3 of 7 chunks, 4 chunks each: 0.35 GB in bfloat16, for one block at a time.

    On CPU with gradients the plain product is used, which holds a chunk's scores: the fused kernel's backward is
    several times slower there.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None:
        return _attend(query, key, value).transpose(1, 2)
    require(
        not mask.window_positions or rotary is not None,
        "block_causal.window_positions",
        mask.window_positions,
        "false where no rotary table is given",
    )
    require(
        query.shape[2] == key.shape[2] == mask.tokens,
        "block_causal.tokens",
        mask.tokens,
        f"the number of queries = {query.shape[2]} and of keys = {key.shape[2]}",
    )
    queries = query.split(mask.chunk_tokens, dim=2)
    parts = []
    for chunk, part in enumerate(queries):
        spans = mask.spans(chunk)
        keys = _columns(key, spans)
        if mask.window_positions and rotary is not None and len(keys) == 2:
            keys[0] = _moved(keys[0], spans[1][0] - spans[0][1], rotary)
        parts.append(_attend(part, _joined(keys), _joined(_columns(value, spans))).transpose(1, 2))
    return torch.cat(parts, dim=1)


def _columns(x: Tensor, spans: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """The tokens of `[b, heads, t, head_dim]` in each of `spans`: views."""
    return [x[:, :, first:end] for first, end in spans]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _moved(key: Tensor, tokens: int, rotary: Rotary) -> Tensor:
    """Turned keys, as if they came so many tokens (whole frames) later: turned on by that frame's own angles."""
    cosine, sine = (table[:, tokens : tokens + 1] for table in rotary)
    return rotate(key, (cosine, sine))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        return plain_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over `[b, heads, t, head_dim]` with all scores in memory; `mask` is boolean, True where allowed."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.float().softmax(-1).to(value.dtype) @ value
