"""Pictures of a training run: sample videos with a contact sheet, and the curves of its losses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from diagonal.config import Config
from diagonal.data.embedded import embedded_world
from diagonal.diffusion.noise import Salt, mixed_seed
from diagonal.diffusion.rollout import rollout
from diagonal.evaluate.pictures import contact_sheet, save_png
from diagonal.media.encode import watchable_scale, write_mp4
from diagonal.model.base_model import load_codec
from diagonal.model.dit import CausalWan
from diagonal.model.text import TextEncoder
from diagonal.model.vae import Decoder, decoder_of
from diagonal.schedule import StepSchedule
from diagonal.training.parallel import rollout_scope
from jobs.runs.update_log import NOT_CURVES

SHEET_SIDE_PX = 128


def sample_captions(config: Config, prompts: Sequence[str]) -> list[str]:
    """Prompts of the sample videos, the same through a run: of unseen scenes where the world has them."""
    known = list(embedded_world(config).captions(True)) if config.is_embedded else prompts
    return list(known[: config.train.sample_clips])


@dataclass(frozen=True)
class SampleVideos:
    """Draws the generator's clips of a few captions: the same seeds each time, by serving's own loop."""

    config: Config
    base: Path
    text: TextEncoder
    captions: Sequence[str]
    device: torch.device

    def draw(self, network: CausalWan, schedule: StepSchedule) -> torch.Tensor:
        """Clean latents `[b, c, f, h, w]` by the weights as they are; collective where the network is sharded."""
        seeds = [mixed_seed(self.config.seed, Salt.SAMPLES, index) for index in range(len(self.captions))]
        with torch.no_grad(), rollout_scope(network):
            return rollout(network, self.config, self._embeddings, seeds, schedule=schedule).clean

    def write(self, latents: torch.Tensor, folder: Path, name: str) -> Path:
        """Decode and write `NAME-0.mp4`, `NAME-1.mp4`, ... and the sheet `NAME.png`; returns the sheet's path."""
        pixels = torch.cat([self._decoder.decode_clip(clip).cpu() for clip in latents.split(1)])
        scale = watchable_scale(*pixels.shape[2:4])
        for index, clip in enumerate(pixels):
            write_mp4(folder / f"{name}-{index}.mp4", clip.numpy(), self.config.geometry.pixel_fps, scale=scale)
        sheet = folder / f"{name}.png"
        reduced = max(1, pixels.shape[3] // SHEET_SIDE_PX)
        save_png(contact_sheet(pixels[:, :, ::reduced, ::reduced], scale=min(scale, 3)), sheet)
        return sheet

    @cached_property
    def _embeddings(self) -> torch.Tensor:
        return self.text.encode(list(self.captions))

    @cached_property
    def _decoder(self) -> Decoder:
        """Loaded at the first sample, on rank 0 alone."""
        return decoder_of(load_codec(self.base, self.config).to(self.device))


def curves(entries: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Updates and values of each figure in a journal's updates."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in NOT_CURVES and isinstance(value, int | float):
                updates, values = found.setdefault(name, ([], []))
                updates.append(entry["update"])
                values.append(float(value))
    return found


def save_curves(entries: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw every figure over the updates, one panel each, as a PNG, whole or not at all."""
    found = curves(entries)
    columns = 3
    rows = max(1, -(-len(found) // columns))
    figure = Figure(figsize=(4.5 * columns, 2.8 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    for index, (name, (updates, values)) in enumerate(sorted(found.items()), 1):
        axes = figure.add_subplot(rows, columns, index)
        axes.plot(updates, values, linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("update", fontsize=8)
        axes.tick_params(labelsize=8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    canvas.print_png(str(temporary))
    os.replace(temporary, path)


def sheet_pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A sheet's pixels `[h, w, 3]`."""
    return np.asarray(Image.open(path).convert("RGB"))
