"""Contact sheets: a picture of clips, one row a clip, its frames from left to right."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from diagonal.errors import require

GAP_PX = 2


def contact_sheet(clips: Tensor, columns: int = 9, scale: int = 3) -> Image.Image:
    """Clips `[b, f, h, w, 3]` uint8 as rows of `columns` frames, evenly spaced in time, enlarged `scale` times."""
    require(clips.ndim == 5 and len(clips) > 0, "clips", tuple(clips.shape), "at least one clip, [b, f, h, w, 3]")
    frames = np.linspace(0, clips.shape[1] - 1, columns).round().astype(int)
    picked = clips[:, frames].numpy().repeat(scale, axis=2).repeat(scale, axis=3)
    padded = np.pad(picked, ((0, 0), (0, 0), (0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255)
    rows, _, height, width, _ = padded.shape
    return Image.fromarray(padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
