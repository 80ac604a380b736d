"""Codecs: latents to pixels chunk by chunk, with the decoder's state held by the caller, one state a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from diffusers import AutoencoderKLWan
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diagonal.errors import require

Network = TypeVar("Network", bound=nn.Module)

JOINED_BYTES = 2**26  # of features that are copied together for one batch


@dataclass
class DecoderState:
    """What one stream's decoder remembers: latent frames decoded so far, and the features its convolutions keep.

    `finite`, `[b]` on the device, says whether the newest pixels were finite, which uint8 no longer tells.
    """

    frames: int = 0
    features: list[Tensor | str | None] = field(default_factory=list)
    finite: Tensor | None = None


class Decoder(ABC):
    """Turns normalised latents into pixels; equal whether a clip comes whole or chunk by chunk.

    `joins` says that streams gain from being decoded as one batch.
    """

    joins = False

    @abstractmethod
    def start(self) -> DecoderState:
        """The state of a stream of which nothing was decoded yet."""

    @abstractmethod
    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        """Pixels `[b, pixel_frames, height, width, 3]` uint8 of the next latent frames `[b, c, f, h, w]`.

        The stream's first latent frame gives one pixel frame, each later one gives the temporal stride.
        """

    def can_join(self, states: Sequence[DecoderState]) -> bool:
        """Whether streams gain from one batch: they are at like places, and their features are few. Copying a large
        video codec's takes as long as a batch would save, as one stream keeps a GPU busy."""
        return self.joins and len(states) > 1 and _alike(states)

    def decode_together(self, latents: Tensor, states: Sequence[DecoderState]) -> list[Tensor]:
        """Pixels `[pixel_frames, height, width, 3]` uint8 of each stream's next latents, of `[b, c, f, h, w]`, for
        streams that `can_join`: within rounding of one after the other. When it raises, no state has changed."""
        features = [_joined(parts) for parts in zip(*(state.features for state in states), strict=True)]
        joined = DecoderState(states[0].frames, features)
        pixels = self.decode(latents, joined)
        for number, state in enumerate(states):
            state.frames = joined.frames
            state.features = [p[number : number + 1].clone() if isinstance(p, Tensor) else p for p in joined.features]
            state.finite = None if joined.finite is None else joined.finite[number : number + 1]
        return list(pixels)

    def decode_clip(self, latents: Tensor) -> Tensor:
        """Pixels `[b, pixel_frames, height, width, 3]` uint8 of a whole clip."""
        return self.decode(latents, self.start())


def _alike(states: Sequence[DecoderState]) -> bool:
    """Whether all have begun or none has, with features of one shape, of few bytes in all."""
    kinds = {tuple(part.shape if isinstance(part, Tensor) else part for part in state.features) for state in states}
    held = [part for part in states[0].features if isinstance(part, Tensor)]
    few = sum(part.numel() * part.element_size() for part in held) * len(states) <= JOINED_BYTES
    return len(kinds) == 1 and len({state.frames > 0 for state in states}) == 1 and few


def _joined(parts: Sequence[Tensor | str | None]) -> Tensor | str | None:
    """Features of several streams as one batch."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(tensors) if tensors else parts[0]


def to_uint8(pixels: Tensor) -> Tensor:
    """uint8 of pixels in [-1, 1]."""
    return ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


class WanDecoder(Decoder):
    """Streaming decode by diffusers' `AutoencoderKLWan`, whose own `decode` forgets its features between calls."""

    joins = True

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    def start(self) -> DecoderState:
        return DecoderState(features=[None] * self._vae._cached_conv_counts["decoder"])

    @torch.no_grad()
    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        parameter = next(self._vae.parameters())
        self._mean, self._std = self._mean.to(latents.device), self._std.to(latents.device)  # once: a copy would wait
        latents = latents * self._std + self._mean
        hidden = self._vae.post_quant_conv(latents.to(parameter.device, parameter.dtype))
        parts = []
        for frame in hidden.split(1, dim=2):
            parts.append(
                self._vae.decoder(frame, feat_cache=state.features, feat_idx=[0], first_chunk=state.frames == 0)
            )
            state.frames += 1
        pixels = torch.cat(parts, dim=2)
        if self._vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self._vae.config.patch_size)
        state.finite = torch.isfinite(pixels).flatten(1).all(1)
        return to_uint8(pixels.permute(0, 2, 3, 4, 1))


class LinearCodec(ModelMixin, ConfigMixin):
    """A linear causal codec: blocks of `temporal_stride` x 8 x 8 pixels to principal components, in closed form.

    The first pixel frame is encoded as a block of equal frames in the same basis (a basis of its own would make the
    first latent a language that one token in 21 speaks), and decoded to that block's last frame. Its latent is shifted
    by `first_frame_mark` standard deviations, up and down by turns over the channels: rotary positions are relative,
    so without a mark nothing tells a noisy clip where it begins (Wan's own codec gives its first frame other
    statistics too).
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        temporal_stride: int = 4,
        spatial_stride: int = 8,
        first_frame_mark: float = 2.0,
    ) -> None:
        super().__init__()
        size = temporal_stride * spatial_stride * spatial_stride * 3
        self.basis = nn.Parameter(torch.zeros(latent_channels, size), requires_grad=False)
        self.centre = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(latent_channels), requires_grad=False)
        signs = torch.tensor([1.0, -1.0]).repeat(latent_channels)[:latent_channels]
        self.register_buffer("mark", (first_frame_mark * signs).view(-1, 1, 1), persistent=False)

    @classmethod
    def fit(
        cls, clips: Tensor, latent_channels: int = 16, motion_channels: int = 6, first_frame_mark: float = 2.0
    ) -> LinearCodec:
        """The codec of clips `[b, pixel_frames, height, width, 3]` uint8.

        `motion_channels` of the latent are principal components of what changes within a block, the others of the
        block's mean picture. Components of both together would leave one channel to motion, which a network then
        has to infer across frames (docs/log.md has the figures).
        """
        require(
            0 < motion_channels < latent_channels,
            "motion_channels",
            motion_channels,
            f"1 to {latent_channels - 1}, below latent_channels",
        )
        codec = cls(latent_channels, first_frame_mark=first_frame_mark)
        blocks = codec._blocks(clips).flatten(0, 3).double()
        centre = blocks.mean(0)
        by_time = (blocks - centre).unflatten(1, (codec.config.temporal_stride, -1))
        still = by_time.mean(1, keepdim=True).expand_as(by_time)
        parts = [
            _components(still.flatten(1), latent_channels - motion_channels),
            _components((by_time - still).flatten(1), motion_channels),
        ]
        codec.centre.data = centre.float()
        codec.basis.data = torch.cat([vectors for vectors, _ in parts]).float().contiguous()
        codec.scale.data = torch.cat([deviations for _, deviations in parts]).float()
        return codec

    def encode(self, clips: Tensor) -> Tensor:
        """Normalised latents `[b, c, f, h, w]` of clips `[b, pixel_frames, height, width, 3]` uint8."""
        latents = torch.einsum("bfhwn,cn->bcfhw", self._blocks(clips) - self.centre, self.basis / self.scale[:, None])
        latents[:, :, 0] += self.mark
        return latents

    def decode_blocks(self, latents: Tensor) -> Tensor:
        """Pixels `[b, f*temporal_stride, height, width, 3]` in [-1, 1] of latents `[b, c, f, h, w]`."""
        t, s = self.config.temporal_stride, self.config.spatial_stride
        blocks = torch.einsum("bcfhw,cn->bfhwn", latents.float(), self.basis * self.scale[:, None]) + self.centre
        grid = blocks.unflatten(-1, (t, s, s, 3)).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return grid.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def _blocks(self, clips: Tensor) -> Tensor:
        t, s = self.config.temporal_stride, self.config.spatial_stride
        frames = clips.shape[1]
        require(frames % t == 1, "pixel_frames", frames, f"1 more than a multiple of {t}")
        pixels = clips.float() / 127.5 - 1.0
        pixels = torch.cat((pixels[:, :1].expand(-1, t - 1, -1, -1, -1), pixels), dim=1)
        grid = pixels.unflatten(3, (-1, s)).unflatten(2, (-1, s)).unflatten(1, (-1, t))
        return grid.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def _components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal directions `[count, n]` of rows `[m, n]`, and their standard deviations."""
    variances, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return vectors[:, -count:].flip(1).T, variances[-count:].flip(0).clamp_min(1e-12).sqrt()


class LinearDecoder(Decoder):
    """Streaming decode by a `LinearCodec`; it keeps no features, only whether the stream has begun."""

    def __init__(self, codec: LinearCodec) -> None:
        self._codec = codec

    def start(self) -> DecoderState:
        return DecoderState()

    @torch.no_grad()
    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        first, frames = state.frames == 0, latents.shape[2]
        latents = latents.to(self._codec.basis.device)
        if first:
            latents = torch.cat((latents[:, :, :1] - self._codec.mark[:, None], latents[:, :, 1:]), dim=2)
        pixels = self._codec.decode_blocks(latents)
        state.finite = torch.isfinite(pixels).flatten(1).all(1)
        state.frames += frames
        return to_uint8(pixels[:, self._codec.config.temporal_stride - 1 :] if first else pixels)


@torch.no_grad()
def encode_clips(codec: AutoencoderKLWan | LinearCodec, clips: Tensor) -> Tensor:
    """Normalised latents `[b, c, f, h, w]` of clips `[b, pixel_frames, height, width, 3]` uint8."""
    if isinstance(codec, LinearCodec):
        return codec.encode(clips)
    vae: AutoencoderKLWan = codec
    parameter = next(vae.parameters())
    pixels = (clips.float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3).to(parameter.device, parameter.dtype)
    mean = torch.tensor(vae.config.latents_mean, device=parameter.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=parameter.device).view(1, -1, 1, 1, 1)
    return (vae.encode(pixels, return_dict=False)[0].mode().float() - mean) / std


def decoder_of(vae: AutoencoderKLWan | LinearCodec) -> Decoder:
    """The streaming decoder of a loaded codec."""
    return WanDecoder(vae) if isinstance(vae, AutoencoderKLWan) else LinearDecoder(vae)


def laid_out(network: Network, layout: str) -> Network:
    """The same network, the weights of its convolutions in memory as `contiguous` or `channels_last`: what runs
    fastest depends on the device."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if layout == "channels_last" else {}
    for parameter in network.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return network
