"""The student network: diffusers' Wan transformer, same modules and names, under a causal forward with a K/V cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from diagonal.errors import require
from diagonal.model.attention import BlockCausal, Rotary, attend, rotary_table, rotate
from diagonal.model.cache import CacheBatch

TIMESTEPS = 1000.0


def timestep(level: Tensor) -> Tensor:
    """The network's time input, `1000 * level` in float32; formed here and nowhere else (docs/method.md, warp)."""
    return level.float() * TIMESTEPS


@dataclass(frozen=True)
class TextContext:
    """Keys and values `[b, l, heads, head_dim]` of every layer's cross-attention: all that a prompt is to the network.

    Computed once a prompt (94 MB of Wan 1.3B in bfloat16) instead of in every forward.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def joined(cls, parts: Sequence[TextContext]) -> TextContext:
        """Those of several samples as one batch."""
        if len(parts) == 1:
            return parts[0]
        keys, values = (
            [torch.cat(layer) for layer in zip(*sides, strict=True)]
            for sides in ([part.keys for part in parts], [part.values for part in parts])
        )
        return cls(tuple(keys), tuple(values))

    def clone(self) -> TextContext:
        return TextContext(tuple(key.clone() for key in self.keys), tuple(value.clone() for value in self.values))

    def copy_(self, other: TextContext) -> None:
        """Take over another's numbers in place."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine.copy_(theirs)

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))


class CausalBlock(WanTransformerBlock):
    """A Wan block whose self-attention also reads given context K/V: a pure function of its inputs."""

    def forward(
        self,
        hidden: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        modulation: Tensor,
        rotary: Rotary,
        context: tuple[Tensor, Tensor] | None = None,
        mask: BlockCausal | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden `[b, t, n]`, text `[b, l, n]` or what `read` made of it, modulation `[b, f, 6, n]` by frame.

        `rotary` is for the current tokens. Context K/V are `[b, t', heads, head_dim]`, their keys after rotary. Returns
        hidden and the current tokens' keys (before rotary) and values, detached, all `[b, t, n]`.
        """
        table = (self.scale_shift_table.unsqueeze(0) + modulation.float()).unsqueeze(3).unbind(2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table
        normed = _modulate(self.norm1(hidden.float()), scale, shift).type_as(hidden)
        mixed, key, value = self._self_attention(normed, rotary, context, mask)
        hidden = (hidden.float() + _by_frame(mixed.float(), gate)).type_as(hidden)
        normed = self.norm2(hidden.float()).type_as(hidden)
        hidden = hidden + self._cross_attention(normed, self.project_text(text) if isinstance(text, Tensor) else text)
        normed = _modulate(self.norm3(hidden.float()), ffn_scale, ffn_shift).type_as(hidden)
        hidden = (hidden.float() + _by_frame(self.ffn(normed).float(), ffn_gate)).type_as(hidden)
        return hidden, key.detach(), value.detach()

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[b, l, heads, head_dim]` of embedded text `[b, l, n]`, for cross-attention."""
        attention = self.attn2
        key, value = (
            attention.to_kv(text).chunk(2, -1) if fused(attention) else (attention.to_k(text), attention.to_v(text))
        )
        return _heads(attention.norm_k(key), attention.heads), _heads(value, attention.heads)

    def fuse(self) -> None:
        """One product instead of three for self-attention's inputs, one instead of two for the text's; inference only,
        as parameters change their names."""
        for attention, parts in ((self.attn1, ("to_q", "to_k", "to_v")), (self.attn2, ("to_k", "to_v"))):
            plain = all(isinstance(getattr(attention, part, None), torch.nn.Linear) for part in parts)
            if not fused(attention) and plain:  # 8-bit layers, and those with an adapter, stay as they are
                trainable = attention.to_k.weight.requires_grad
                attention.fuse_projections()
                for part in parts:
                    delattr(attention, part)
                attention.requires_grad_(trainable)

    def unfuse(self) -> None:
        """The separate projections again, over the same weights."""
        for attention, whole, parts in (
            (self.attn1, "to_qkv", ("to_q", "to_k", "to_v")),
            (self.attn2, "to_kv", ("to_k", "to_v")),
        ):
            if fused(attention):
                joined = getattr(attention, whole)
                pairs = zip(joined.weight.chunk(len(parts)), joined.bias.chunk(len(parts)), strict=True)
                for part, (weight, bias) in zip(parts, pairs, strict=True):
                    linear = torch.nn.Linear(joined.in_features, len(weight), device="meta")
                    linear.load_state_dict({"weight": weight, "bias": bias}, assign=True)
                    setattr(attention, part, linear.requires_grad_(joined.weight.requires_grad))
                attention.unfuse_projections()

    def _self_attention(
        self, x: Tensor, rotary: Rotary, context: tuple[Tensor, Tensor] | None, mask: BlockCausal | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attn1
        query, key, value = (
            attention.to_qkv(x).chunk(3, -1)
            if fused(attention)
            else (attention.to_q(x), attention.to_k(x), attention.to_v(x))
        )
        query, key = _heads(attention.norm_q(query), attention.heads), attention.norm_k(key)
        keys, values = rotate(_heads(key, attention.heads), rotary), _heads(value, attention.heads)
        if context is not None:
            keys = torch.cat((context[0].type_as(key), keys), dim=1)
            values = torch.cat((context[1].type_as(value), values), dim=1)
        mixed = attend(rotate(query, rotary), keys, values, mask, rotary)
        return attention.to_out[0](mixed.flatten(2).type_as(x)), key, value

    def _cross_attention(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        attention = self.attn2
        query = _heads(attention.norm_q(attention.to_q(x)), attention.heads)
        return attention.to_out[0](attend(query, *text).flatten(2).type_as(x))


def fused(attention: torch.nn.Module) -> bool:
    """Whether `CausalBlock.fuse` joined its projections."""
    return bool(getattr(attention, "fused_projections", False))


class CausalWan(WanTransformer3DModel):
    """Wan's transformer as a causal generator; loads and saves diffusers checkpoints of `WanTransformer3DModel`."""

    _no_split_modules = ["CausalBlock"]
    _repeated_blocks = ["CausalBlock"]

    @register_to_config
    def __init__(  # noqa: PLR0913 (diffusers' own arguments, so that its checkpoints load)
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        require(tuple(patch_size)[0] == 1, "transformer.patch_size", patch_size, "one that keeps frames apart: 1, h, w")
        require(image_dim is None, "transformer.image_dim", image_dim, "null: only text-to-video models are supported")
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        for block in self.blocks:
            block.__class__ = CausalBlock  # same parameters, our pure forward; no second allocation
        self._tables: dict[tuple[object, ...], Rotary] = {}

    def fuse(self) -> None:
        """Join projections that read one input; for inference, where nobody asks for parameters by name."""
        for block in self.blocks:
            block.fuse()

    def unfuse(self) -> None:
        """Undo `fuse`, so that parameters have diffusers' names."""
        for block in self.blocks:
            block.unfuse()

    @torch.no_grad()
    def project_text(self, text: Tensor) -> TextContext:
        """What `forward` makes of embeddings `[b, l, n]` every time, to give it instead of them (inference)."""
        weight = self.condition_embedder.text_embedder.linear_1.weight
        embedded = self.condition_embedder.text_embedder(text.to(weight.device, weight.dtype))
        keys, values = zip(*(block.project_text(embedded) for block in self.blocks), strict=True)
        return TextContext(tuple(keys), tuple(value.contiguous() for value in values))

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        text: Tensor | TextContext,
        *,
        cache: CacheBatch | None = None,
        write: bool = False,
        mask: BlockCausal | None = None,
    ) -> Tensor:
        """Velocity `[b, c, f, h, w]` in float32 of latents at noise `level` `[b, f]` in [0, 1], given text `[b, l, n]`.

        With `cache`, latents are one chunk (or its `tail`) that also attends to the cached context, and `write` stores
        its K/V.
        Without, latents are a whole clip, in which each chunk sees what `mask` says (None: everything sees everything).
        """
        frames, heads = latents.shape[2], self.config.num_attention_heads
        height, width = self._token_grid(latents)
        hidden = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        time, modulation = self._time(level)
        texts = self._texts(text, hidden)
        seen_frames = frames + (cache.context_tokens if cache else 0) // (height * width)
        rotary = self._rotary(seen_frames, height, width)
        here = (rotary[0][:, -hidden.shape[1] :], rotary[1][:, -hidden.shape[1] :])
        for layer, block in enumerate(self.blocks):
            context = cache.rotated(layer, rotary, hidden.dtype) if cache and cache.context_tokens else None
            hidden, key, value = block(hidden.contiguous(), texts[layer], modulation, here, context, mask)
            if cache and write:
                cache.write(layer, _heads(key, heads), _heads(value, heads))
        shift, scale = (self.scale_shift_table.unsqueeze(0) + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        hidden = _modulate(self.norm_out(hidden.float()), scale, shift).type_as(hidden)
        return self._unpatchify(self.proj_out(hidden), frames, height, width).float()

    def _texts(self, text: Tensor | TextContext, hidden: Tensor) -> Sequence[Tensor | tuple[Tensor, Tensor]]:
        """What each block reads of the text."""
        if isinstance(text, TextContext):
            return list(zip(text.keys, text.values, strict=True))
        return [self.condition_embedder.text_embedder(text.type_as(hidden))] * len(self.blocks)

    def _rotary(self, frames: int, height: int, width: int) -> Rotary:
        """The table of `rotary_table`, computed once for each length: a stream has as many as its window has chunks."""
        of = self.rope.freqs_cos
        key = (frames, height, width, of.dtype, of.device)
        if key not in self._tables:
            self._tables[key] = rotary_table(self.rope, frames, height, width)
        return self._tables[key]

    def _token_grid(self, latents: Tensor) -> tuple[int, int]:
        _, patch_height, patch_width = self.config.patch_size
        return latents.shape[3] // patch_height, latents.shape[4] // patch_width

    def _time(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding `[b, f, n]` and block modulation `[b, f, 6, n]`, by frame; the embedding is in float32."""
        embedder = self.condition_embedder
        with torch.autocast(level.device.type, enabled=False):
            waves = embedder.timesteps_proj(timestep(level).flatten())
            weights_dtype = embedder.time_embedder.linear_1.weight.dtype
            time = embedder.time_embedder(waves.to(weights_dtype)).float().unflatten(0, level.shape)
        signal = embedder.act_fn(time).to(embedder.time_proj.weight.dtype)
        return time, embedder.time_proj(signal).unflatten(-1, (6, -1)).float()

    def _unpatchify(self, tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
        _, patch_height, patch_width = self.config.patch_size
        grid = tokens.unflatten(1, (frames, height, width)).unflatten(-1, (patch_height, patch_width, -1))
        shape = (len(tokens), -1, frames, height * patch_height, width * patch_width)
        return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(shape)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _by_frame(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply tokens `[b, f*t, n]` by a factor `[b, f, 1, n]` of their frame."""
    return (x.unflatten(1, (factor.shape[1], -1)) * factor).flatten(1, 2)


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x*(1 + scale) + shift` on tokens `[b, f*t, n]` with scale and shift `[b, f, 1, n]` by frame."""
    return (x.unflatten(1, (scale.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)
