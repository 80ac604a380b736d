"""Measures of any video, from its pixels alone: colour, sharpness, motion, flicker; pixel values run from 0 to 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diagonal.errors import require

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # ITU-R BT.709


@dataclass(frozen=True)
class VideoMeasures:
    """The four measures of one clip, each the mean over its frames."""

    saturation: float
    sharpness: float
    motion: float
    flicker: float


def measure(pixels: Pixels) -> VideoMeasures:
    """All four measures of uint8 `[f, h, w, 3]`."""
    return VideoMeasures(saturation(pixels), sharpness(pixels), motion_amplitude(pixels), flicker(pixels))


def saturation(pixels: Pixels) -> float:
    """Mean saturation of HSV: (max - min) / max of the channels, 0 for black. 0 is grey, 1 is pure colour."""
    values = _floats(pixels)
    red, green, blue = np.moveaxis(values, -1, 0)  # many times faster than a reduction over an axis of three
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return float(np.mean((high - low) / np.maximum(high, np.float32(1 / 255))))


def sharpness(pixels: Pixels) -> float:
    """Mean size of the luma gradient within a frame; 0 is one flat colour, and blur lowers it.

    Squared before the mean, so that one steep edge counts for more than the same rise spread over many pixels.
    """
    luma = _luma(pixels)
    across, down = np.diff(luma, axis=2), np.diff(luma, axis=1)
    return float(np.sqrt((np.square(across).sum() + np.square(down).sum()) / luma.size))


def brightness(pixels: Pixels) -> float:
    """Mean luma; 0 is black, 1 is white."""
    return float(_luma(pixels).mean())


def motion_amplitude(pixels: Pixels) -> float:
    """Mean absolute change of a pixel's luma between neighbouring frames; 0 is a still."""
    return float(frame_steps(pixels).mean()) if len(pixels) > 1 else 0.0


def frame_steps(pixels: Pixels) -> Floats:
    """Mean absolute change of a pixel's luma from each frame to the next, `[f-1]`."""
    steps: Floats = np.abs(np.diff(_luma(pixels), axis=0)).mean(axis=(1, 2))
    return steps


def flicker(pixels: Pixels) -> float:
    """Mean absolute second difference in time of the frame's mean luma.

    A steady picture and a steady fade have none; brightness that jumps up and down has.
    """
    brightness = _luma(pixels).mean(axis=(1, 2))
    return float(np.abs(np.diff(brightness, n=2)).mean()) if len(brightness) > 2 else 0.0


def _floats(pixels: Pixels) -> Floats:
    video = pixels.ndim == 4 and pixels.shape[-1] == 3 and pixels.size > 0
    require(video, "pixels.shape", pixels.shape, "[f, h, w, 3]")
    require(pixels.dtype == np.uint8, "pixels.dtype", str(pixels.dtype), "uint8")
    return pixels.astype(np.float32) / np.float32(255)


def _luma(pixels: Pixels) -> Floats:
    return _floats(pixels) @ _LUMA
