"""A small decoder that stands in for the codec's own: causal residual blocks that also see the step before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diagonal.errors import require
from diagonal.model.architecture import constructor_settings
from diagonal.model.vae import Decoder, DecoderState, to_uint8

Memory = list[Tensor | None]


class MemoryBlock(nn.Module):
    """A residual block over each step's features together with those of the step before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features `[b, t, n, h, w]` and the last step before them `[b, 1, n, h, w]` (None is zeros), to features of
        the same shape and the last step of `x`."""
        before = torch.zeros_like(x[:, :1]) if before is None else before
        pairs = torch.cat((x, torch.cat((before, x[:, :-1]), dim=1)), dim=2)
        mixed = self.out(F.relu(self.mix(pairs.flatten(0, 1)))).unflatten(0, x.shape[:2])
        return F.relu(x + mixed), x[:, -1:]


class Rise(nn.Module):
    """Twice the height and width, and `steps` steps for each; a stream's very first step gives its last one alone."""

    def __init__(self, width: int, wider: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.spread = nn.Conv2d(width, steps * 4 * wider, 1)

    def forward(self, x: Tensor, first: bool) -> Tensor:
        """`[b, t, n, h, w]` to `[b, t*steps, n', 2*h, 2*w]`."""
        spread = F.pixel_shuffle(self.spread(x.flatten(0, 1)), 2).unflatten(1, (self.steps, -1))
        risen = spread.unflatten(0, x.shape[:2]).flatten(1, 2)
        return risen[:, -1:] if first else risen


class FastDecoder(ModelMixin, ConfigMixin):
    """Normalised latents to pixels in a few 2D convolutions a level, distilled from the full decoder.

    Level k has `2**k` times the latents' height and width and features of `widths[k]`; `blocks[k]` memory blocks work
    there. What is left of the spatial stride after the levels, the last convolution puts out as patches. Time rises in
    the last levels, twice in each. A pixel depends on `memory_frames` latent frames before its own and on no later one.

    A linear map from each latent to its pixels gives the coarse picture, so that training starts from one instead of
    from the mean of all. A stream's first frame, whose latents have other statistics, gets an offset of its own.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        temporal_stride: int = 4,
        spatial_stride: int = 8,
        widths: Sequence[int] = (256, 128, 64),
        blocks: Sequence[int] = (3, 3, 2),
    ) -> None:
        super().__init__()
        rises, doublings = len(widths) - 1, temporal_stride.bit_length() - 1
        require(
            len(blocks) == len(widths) and min(widths, default=0) > 0 and min(blocks) >= 0,
            "decoder.blocks",
            tuple(blocks),
            f"a number of blocks for each of the {len(widths)} widths",
        )
        require(
            temporal_stride == 2**doublings and doublings <= rises,
            "decoder.temporal_stride",
            temporal_stride,
            f"a power of two of at most 2**{rises}: one doubling a level above the first",
        )
        require(spatial_stride % 2**rises == 0, "decoder.spatial_stride", spatial_stride, f"a multiple of 2**{rises}")
        self.patch, self.stride, self.colours = spatial_stride // 2**rises, spatial_stride, (temporal_stride, 3)
        self.offset = nn.Parameter(torch.zeros(latent_channels, 1, 1))
        self.coarse = nn.Conv2d(latent_channels, 3 * temporal_stride * spatial_stride**2, 1)
        self.enter = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.counts = tuple(blocks)
        self.steps = tuple(2 if level >= rises - doublings else 1 for level in range(rises))
        self.body = nn.ModuleList(
            MemoryBlock(width) for width, count in zip(widths, blocks, strict=True) for _ in range(count)
        )
        self.rises = nn.ModuleList(
            Rise(low, high, steps) for low, high, steps in zip(widths, widths[1:], self.steps, strict=False)
        )
        self.leave = nn.Conv2d(widths[-1], 3 * self.patch**2, 3, padding=1)

    @property
    def memories(self) -> int:
        """How many features a stream remembers, one a block."""
        return sum(self.counts)

    @property
    def memory_frames(self) -> int:
        """Latent frames before a frame that its pixels depend on."""
        rates = [math.prod(self.steps[:level]) for level in range(len(self.counts))]
        return math.ceil(sum(count / rate for count, rate in zip(self.counts, rates, strict=True)))

    def forward(self, latents: Tensor, memory: Memory, first: bool) -> Tensor:
        """Pixels `[b, pixel_frames, 3, height, width]`, about [-1, 1], of latents `[b, c, f, h, w]`.

        `memory` (of `memories` entries, None at a stream's beginning) is brought up to date. With `first` the latents'
        first frame is the stream's, which gives one pixel frame.
        """
        if first and latents.shape[2] > 1:
            parts = (self(latents[:, :, :1], memory, True), self(latents[:, :, 1:], memory, False))
            return torch.cat(parts, dim=1)
        x = latents.transpose(1, 2)
        x = x + self.offset if first else x
        coarse = self._coarse(x)
        x = F.relu(self.enter(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        for level, count in enumerate(self.counts):
            x = F.relu(self.rises[level - 1](x, first)) if level else x
            before = sum(self.counts[:level])
            for index in range(before, before + count):
                x, memory[index] = self.body[index](x, memory[index])
        fine = F.pixel_shuffle(self.leave(x.flatten(0, 1)), self.patch).unflatten(0, x.shape[:2])
        return fine + coarse[:, -fine.shape[1] :]

    def _coarse(self, x: Tensor) -> Tensor:
        """Pixels `[b, t*temporal_stride, 3, height, width]` of latents `[b, t, c, h, w]` by the linear map."""
        shuffled = F.pixel_shuffle(self.coarse(x.flatten(0, 1)), self.stride).unflatten(1, self.colours)
        return shuffled.unflatten(0, x.shape[:2]).flatten(1, 2)


class StreamingNetwork(Protocol):
    """What turns latents into pixels with a memory that its caller keeps: `FastDecoder`, `TaehvDecoder`."""

    @property
    def memories(self) -> int: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, latents: Tensor, memory: Memory, first: bool) -> Tensor: ...


class StreamingFastDecoder(Decoder):
    """Decode by such a network, one latent frame after another: a convolution over more at once may round otherwise,
    and then a stream's pixels would depend on how it was cut."""

    joins = True

    def __init__(self, network: StreamingNetwork) -> None:
        self._network = network

    def start(self) -> DecoderState:
        return DecoderState(features=[None] * self._network.memories)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        parameter = next(self._network.parameters())
        parts = []
        for frame in latents.to(parameter.device, parameter.dtype).split(1, dim=2):
            memory: Memory = [part if isinstance(part, Tensor) else None for part in state.features]
            parts.append(self._network(frame, memory, state.frames == 0))
            state.features = [None if part is None else part.clone() for part in memory]
            state.frames += 1
        pixels = torch.cat(parts, dim=1)
        state.finite = torch.isfinite(pixels).flatten(1).all(1)
        return to_uint8(pixels).permute(0, 1, 3, 4, 2)


def frame_flops(network: FastDecoder, height: int, width: int) -> int:
    """Operations of decoding one later latent frame of `height` x `width`, two for each multiply-add."""
    copy = FastDecoder(**constructor_settings(FastDecoder, network.config)).to("meta")
    latents = torch.empty(1, network.config.latent_channels, 1, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy(latents, [None] * network.memories, False)
    return int(counter.get_total_flops())
