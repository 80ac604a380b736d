"""Distillation of the fast decoder: it regresses the full decoder's pixels of the student's own latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagonal.config import Config
from diagonal.diffusion.noise import Salt, generator, mixed_seed
from diagonal.diffusion.rollout import rollout
from diagonal.model.dit import CausalWan
from diagonal.model.fast_decoder import FastDecoder, Memory
from diagonal.model.text import TextEncoder
from diagonal.model.vae import Decoder

Report = Callable[[int, Mapping[str, float]], None]
CLIPS_PER_ROLLOUT = 16


@dataclass(frozen=True)
class DecodedClips:
    """What is learned from: latents `[n, c, f, h, w]`, and the full decoder's pixels of them
    `[n, pixel_frames, height, width, 3]` uint8, both on the CPU."""

    latents: Tensor
    pixels: Tensor


def decoded_clips(
    student: CausalWan, text: TextEncoder, decoder: Decoder, config: Config, prompts: Sequence[str]
) -> DecodedClips:
    """`decoder.clips` clips of the student for the prompts in turn, each cut to a crop of the seed and decoded."""
    options, latents, pixels = config.decoder, [], []
    for start in range(0, options.clips, CLIPS_PER_ROLLOUT):
        samples = range(start, min(start + CLIPS_PER_ROLLOUT, options.clips))
        with torch.no_grad():
            embeddings = text.encode([prompts[sample % len(prompts)] for sample in samples])
            seeds = [mixed_seed(config.seed, Salt.DECODER_CLIPS, sample) for sample in samples]
            clean = rollout(student, config, embeddings, seeds).clean
        for sample, clip in zip(samples, clean.split(1), strict=True):
            part = _cropped(clip, options.crop_latents, generator(config.seed, Salt.DECODER_CROP, sample))
            latents.append(part.cpu())
            pixels.append(decoder.decode_clip(part).cpu())
    return DecodedClips(torch.cat(latents), torch.cat(pixels))


def _cropped(latents: Tensor, crop: int, draw: torch.Generator) -> Tensor:
    """A square of `crop` latents a side, or all of a side that is no longer (0: of both)."""
    for dim in (3, 4):
        if 0 < crop < (size := latents.shape[dim]):
            latents = latents.narrow(dim, int(torch.randint(size - crop + 1, (1,), generator=draw)), crop)
    return latents


def new_fast_decoder(config: Config) -> FastDecoder:
    """An untrained fast decoder of the configured layout and the geometry's strides, from the seed."""
    geometry, options = config.geometry, config.decoder
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(config.seed, Salt.FAST_DECODER))
        return FastDecoder(
            geometry.latent_channels, geometry.temporal_stride, geometry.spatial_stride, options.widths, options.blocks
        )


@torch.no_grad()
def begin_linear(network: FastDecoder, clips: DecodedClips) -> None:
    """Make the network the best linear decoder of these clips (least squares), with its fine part at zero.

    Latents of first frames are shifted to the mean of the others.
    """
    channels, steps, stride = network.config.latent_channels, network.colours[0], network.stride
    squares, products = torch.zeros(channels + 1, channels + 1), torch.zeros(channels + 1, network.coarse.out_channels)
    for latents, pixels in zip(clips.latents.float(), clips.pixels, strict=True):
        rows = F.pad(latents[:, 1:].permute(1, 2, 3, 0).flatten(0, 2), (0, 1), value=1.0)
        shown = (pixels[1:].float() / 127.5 - 1.0).unflatten(2, (-1, stride)).unflatten(1, (-1, stride))
        blocks = shown.unflatten(0, (-1, steps)).permute(0, 2, 4, 1, 6, 3, 5).flatten(3).flatten(0, 2)
        squares += rows.T @ rows
        products += rows.T @ blocks
    found = torch.linalg.lstsq(squares.double(), products.double()).solution.float()
    network.coarse.weight.copy_(found[:-1].T[..., None, None])
    network.coarse.bias.copy_(found[-1])  # type: ignore[union-attr]
    means = [part.mean((0, 2, 3, 4)) for part in (clips.latents[:, :, 1:], clips.latents[:, :, :1])]
    network.offset.copy_((means[0] - means[1])[:, None, None])
    for parameter in network.leave.parameters():
        parameter.zero_()


def pixel_loss(shown: Tensor, wanted: Tensor, difference: float) -> Tensor:
    """`mse + 0.1*l1 + difference*mean of the squared errors of dt, dy and dx`, over `[b, f, 3, h, w]`.

    The differences are those of neighbours in time, height and width: they keep edges and motion sharp where a mean
    over all pixels is content with a blur. One frame alone has none in time.
    """
    error = shown - wanted
    loss = error.square().mean() + 0.1 * error.abs().mean()
    changes = [error.diff(dim=dim).square().mean() for dim in (1, 3, 4) if error.shape[dim] > 1]
    return loss + difference * torch.stack(changes).mean() if changes else loss


@dataclass
class DecoderTraining:
    """All that decides the next update: network, optimizer, and the number of the last one."""

    network: FastDecoder
    optimizer: torch.optim.Optimizer
    update: int = 0

    @classmethod
    def new(cls, config: Config, device: torch.device | str) -> DecoderTraining:
        network = new_fast_decoder(config).to(device)
        return cls(network, torch.optim.AdamW(network.parameters(), lr=config.decoder.lr, weight_decay=0.0))

    def to_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "update": self.update}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Stand where `to_dict` stood."""
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.update = int(saved["update"])


def train_fast_decoder(
    config: Config, state: DecoderTraining, clips: DecodedClips, report: Report, save: Callable[[], None]
) -> None:
    """Go on to the last update; `report(update, figures)` each, `save()` every `decoder.checkpoint_every` of them.

    What an update draws depends on (seed, update) alone, so that a resumed run is the same run.
    """
    options = config.decoder
    if state.update == 0:
        begin_linear(state.network, clips)
    while state.update < options.updates:
        update = state.update + 1
        rate = min(1.0, update / 20, max(0.02, 2.0 * (options.updates - update) / options.updates))
        state.optimizer.param_groups[0]["lr"] = options.lr * rate
        loss = _loss(config, state.network, clips, generator(config.seed, Salt.DECODER_UPDATE, update))
        loss.backward()
        nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.update = update
        report(update, {"loss": float(loss.detach())})
        if update % options.checkpoint_every == 0 or update == options.updates:
            save()


def _loss(config: Config, network: FastDecoder, clips: DecodedClips, draw: torch.Generator) -> Tensor:
    """Of a few clips' frames from a common start: the clip's own in one update of four, else anywhere; there the
    frames that would need what was before them only fill the memory."""
    options, stride = config.decoder, config.geometry.temporal_stride
    chosen = torch.randint(len(clips.latents), (options.batch_size,), generator=draw)
    total, warm = clips.latents.shape[2], network.memory_frames
    length = min(options.frames, total)
    whole = int(torch.randint(4, (1,), generator=draw)) == 0 or warm + 1 + length > total
    start = 0 if whole else int(torch.randint(1, total - length - warm + 1, (1,), generator=draw))
    end = start + length + (0 if whole else warm)
    device = next(network.parameters()).device
    memory: Memory = [None] * network.memories
    shown = network(clips.latents[chosen, :, start:end].to(device), memory, whole)
    skipped = 0 if whole else warm * stride
    first = 0 if whole else 1 + (start - 1) * stride + skipped
    wanted = clips.pixels[chosen, first : first + shown.shape[1] - skipped].to(device)
    return pixel_loss(
        shown[:, skipped:], wanted.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0, options.difference_weight
    )
