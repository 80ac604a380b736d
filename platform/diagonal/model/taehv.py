"""The fast decoder of the field: TAEHV's decoder for Wan2.1 latents, under the names of its published files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diagonal.errors import require
from diagonal.model.fast_decoder import Memory
from diagonal.model.student_files import read_student_file

PREFIX = "decoder."  # of its tensors in a file that holds the encoder too
_BLOCKS, _BOUND = 3, 3.0


class _Bounded(nn.Module):
    """Latents kept within the bound, smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / _BOUND) * _BOUND


class _MemoryBlock(nn.Module):
    """A residual block over each step's features and those of the step before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(inner, width, 3, padding=1) for inner in (2 * width, width, width)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[b, t, n, h, w]` and the last step before (None is zeros), to the same shape and the last step of `x`."""
        before = torch.zeros_like(x[:, :1]) if before is None else before
        pairs = torch.cat((x, torch.cat((before, x[:, :-1]), dim=1)), dim=2)
        return F.relu(self.conv(pairs.flatten(0, 1)).unflatten(0, x.shape[:2]) + x), x[:, -1:]


class _Growth(nn.Module):
    """`steps` steps for each; steps are consecutive channels of one convolution."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, steps * width, 1, bias=False)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """`[t, n, h, w]` to `[t*steps, n, h, w]`."""
        return self.conv(x).unflatten(1, (self.steps, -1)).flatten(0, 1)


class TaehvDecoder(ModelMixin, ConfigMixin):
    """Normalised latents to pixels, at each of three levels three memory blocks, twice the size, and in the last levels
    twice the steps. A stream's first latent gives the last of its frames alone."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        temporal_stride: int = 4,
        spatial_stride: int = 8,
        widths: Sequence[int] = (256, 128, 64, 64),
    ) -> None:
        super().__init__()
        levels, doublings = len(widths) - 1, temporal_stride.bit_length() - 1
        layers: list[nn.Module] = [_Bounded(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for level, (width, narrower) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [_MemoryBlock(width) for _ in range(_BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), _Growth(width, 2 if level >= levels - doublings else 1)]
            layers.append(nn.Conv2d(width, narrower, 3, padding=1, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    @property
    def memories(self) -> int:
        """How many features a stream remembers, one a block."""
        return sum(isinstance(layer, _MemoryBlock) for layer in self.decoder)

    def forward(self, latents: Tensor, memory: Memory, first: bool) -> Tensor:
        """Pixels `[b, pixel_frames, 3, height, width]` in [-1, 1] of latents `[b, c, f, h, w]`.

        `memory` (of `memories` entries, None at a stream's beginning) is brought up to date.
        """
        x, number = latents.transpose(1, 2), 0
        for layer in self.decoder:
            if isinstance(layer, _MemoryBlock):
                x, memory[number] = layer(x, memory[number])
                number += 1
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (len(latents), -1))
        return x[:, self.config.temporal_stride - 1 if first else 0 :].clamp(0.0, 1.0) * 2.0 - 1.0


def write_taehv(file: Path, folder: Path) -> None:
    """Write the decoder of a published file (`taew2_1.pth` or .safetensors) as a release's `decoder/`; not atomic.

    `FieldError` names tensors that are missing, or of another model of that family.
    """
    held = read_student_file(file)
    weights = {name: value for name, value in held.items() if name.startswith(PREFIX)}
    decoder = TaehvDecoder()
    own, where = decoder.state_dict(), f"those of taew2_1, in {file}"
    different = own.keys() ^ weights.keys()
    different |= {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    require(not different, "decoder tensors", sorted(different)[:3], where)
    decoder.load_state_dict(weights)
    decoder.save_pretrained(folder)
