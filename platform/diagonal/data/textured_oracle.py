"""The oracle of the textured world: reads both objects, their motion and change, and the ground from pixels alone.

Colour separates what overlaps: a pixel's hue is a mixture of the two objects' hues and of grey. Each object is then
found by the template (shape and size) that departs least from its share, wherever it lies, so that the part of the
first which the small one hides does not count.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagonal.data.motion import STRIDE_FRAMES, Times, pace, read_box, smoothness
from diagonal.data.textured import (
    ATTRIBUTES,
    CHANGES,
    DARKENING,
    FIRST_SIZE,
    GLOW,
    GROUND_AMPLITUDE,
    PERIOD_S,
    PULSE,
    SMALL_SIZE,
    SMALL_SPEED_PX,
    SPEEDS_PX,
    TEXTURES,
    TexturedScene,
    cover,
)
from diagonal.data.world import DIRECTIONS, PALETTE, REFERENCE_FPS, SHAPES, Floats, Pixels, WorldConfig

FIRST_SIZES = FIRST_SIZE * np.linspace(0.65, 1.35, 8, dtype=np.float32)
SMALL_SIZES = SMALL_SIZE * np.linspace(0.85, 1.15, 3, dtype=np.float32)
FAINTEST, FULL = 0.1, 0.2  # shares of the palette's chroma: below no colour, above fully coloured
LEAST_AREA = 0.4  # of the smallest object's: less is no object
DARKEST = 1 - DARKENING  # of an object's chroma: what its stripes keep
BRIGHT_SHARE = 0.7  # of the most coloured pixels' chroma: more than any stripe has
SWING_SHARE = 0.45  # of the world's own swing: less is no change
LEAST_PERIOD_SHARE = 0.75  # of a period: shorter clips do not tell what changes


@dataclass(frozen=True)
class ObjectReadings:
    """What each pixel frame shows of one object; a frame that holds too little of it is not `present`."""

    present: NDArray[np.bool_]  # [f]
    centre_px: Floats  # [f 2], x and y
    size: Floats  # [f], 1 is the first world's
    shape_error: Floats  # [f 3], how far each shape's best template is off; 0 where absent
    chroma: Floats  # [f], share of the palette colour's chroma where the object is brightest; 0 where absent


@dataclass(frozen=True)
class TexturedReading:
    """What a clip shows: None for an attribute that cannot be seen; every measure is 0 where there is no object.

    `smoothness` and `steadiness` are those of the first object's motion (see `data/oracle.py`). `saturation` is 1 where
    both objects are as colourful as the palette; `ground` is 1 where the ground has as much contrast as the world's.
    `pace_px` is the first object's speed in pixels a frame, `shape_errors` how far off it each shape's template is.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    speed: str | None
    texture: str | None
    change: str | None
    small_colour: str | None
    small_shape: str | None
    small_direction: str | None
    smoothness: float
    steadiness: float
    saturation: float
    ground: float
    first_pixel_frame: int = 0
    pace_px: float = 0.0
    shape_errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class TexturedScores:
    """Agreement of a reading with a scene: 0 or 1 for the attributes, the measures as they were read.

    Behind the hits, what they hide: `pace` is the speed seen over the caption's, `margin` how much nearer the caption's
    shape is than the nearest other, as a share of both, from -1 to 1.
    """

    colour: float
    shape: float
    direction: float
    speed: float
    texture: float
    change: float
    small_colour: float
    small_shape: float
    small_direction: float
    smoothness: float
    steadiness: float
    saturation: float
    ground: float
    pace: float
    margin: float


def read_clip(pixels: Pixels, config: WorldConfig, first_pixel_frame: int = 0) -> TexturedReading:
    """Read a clip, uint8 [f h w 3] of any length, from its pixels alone; `first_pixel_frame` is where it was cut out.

    ValueError when the clip is not uint8 or not of the config's size.
    """
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (config.size_px, config.size_px, 3):
        raise ValueError(
            f"pixels = {pixels.dtype} {pixels.shape}: must be uint8 (frames, {config.size_px}, {config.size_px}, 3)"
        )
    colours = _smooth(pixels.astype(np.float32) / np.float32(255))
    hues = _hues(colours)
    found = _two_colours(hues, config)
    first, small = found
    nothing = TexturedReading(
        None, None, None, None, None, None, None, None, None, 0.0, 0.0, 0.0, 0.0, first_pixel_frame
    )
    if first is None:
        return nothing
    front: Floats = np.zeros(hues.shape[:3], np.float32)
    share, front_share = _mixture(hues, first, small)
    in_front = None
    if small is not None:
        in_front = _find(front_share, np.ones_like(front), SMALL_SIZES, config)
        front = _silhouette(in_front, 1.3, config)
    behind = _find(share, 1 - front, FIRST_SIZES, config)
    if 2 * behind.present.sum() < len(pixels):
        return nothing
    return _summarise(behind, in_front, first, small, share, front, colours, config, first_pixel_frame)


def tells_change(pixel_frames: int, config: WorldConfig) -> bool:
    """Whether a piece is long enough to tell what changes in it."""
    return pixel_frames - 1 >= LEAST_PERIOD_SHARE * config.fps * PERIOD_S


def score(reading: TexturedReading, scene: TexturedScene, config: WorldConfig) -> TexturedScores:
    """Compare a reading with what its caption promised.

    A piece that starts after a clip's first frame may lie on any leg of a track: there the axis counts.
    """
    later = reading.first_pixel_frame > 0
    agree = {name: float(getattr(reading, name) == getattr(scene, name)) for name in ATTRIBUTES}
    for name in ("direction", "small_direction"):
        seen, promised = getattr(reading, name), getattr(scene, name)
        if later and seen:
            agree[name] = float(np.abs(DIRECTIONS[seen]).tolist() == np.abs(DIRECTIONS[promised]).tolist())
    measures = {name: getattr(reading, name) for name in ("smoothness", "steadiness", "saturation", "ground")}
    pace = reading.pace_px / _pixels(SPEEDS_PX[scene.speed], config)
    return TexturedScores(**agree, **measures, pace=pace, margin=_margin(reading, scene))


def _margin(reading: TexturedReading, scene: TexturedScene) -> float:
    errors = dict(zip(SHAPES, reading.shape_errors, strict=False))
    if not errors:
        return 0.0
    right = errors.pop(scene.shape)
    other = min(errors.values())
    return (other - right) / max(other + right, 1e-9)


def _smooth(images: Floats) -> Floats:
    """Mean over 3 x 3 pixels, the rim repeated."""
    for axis in (1, 2):
        own, count = np.moveaxis(images, axis, 0), images.shape[axis]
        padded = np.concatenate([own[:1], own, own[-1:]])
        total = padded[:count] + own + padded[2:]
        images = np.moveaxis(total / np.float32(3), 0, axis)
    return images


def _hues(colours: Floats) -> Floats:
    """Colour without its grey, in the plane of hues, [... 2]; every palette colour has length 1."""
    plane = np.asarray([[2, -1, -1], [0, np.sqrt(3), -np.sqrt(3)]], np.float32) / np.float32(2)
    lengths = np.linalg.norm(np.asarray(list(PALETTE.values()), np.float32) @ plane.T, axis=1)
    return colours @ (plane.T / lengths.mean())


def _palette_hues() -> Floats:
    return _hues(np.asarray(list(PALETTE.values()), np.float32))


def _two_colours(hues: Floats, config: WorldConfig) -> tuple[int | None, int | None]:
    """Palette places of the colour that covers most of the clip and of the next one; None where too little shows."""
    chroma = np.linalg.norm(hues, axis=-1)
    nearest = (hues @ _palette_hues().T).argmax(-1)
    weight = np.clip((chroma - FAINTEST) / (FULL - FAINTEST), 0, 1)
    areas = np.asarray([weight[nearest == place].sum() for place in range(len(PALETTE))]) / max(len(hues), 1)
    smallest = 100 * (SMALL_SIZE * config.scale) ** 2
    order = np.argsort(-areas)
    first, second = (int(place) if areas[place] >= LEAST_AREA * smallest else None for place in order[:2])
    return first, second


def _mixture(hues: Floats, first: int, small: int | None) -> tuple[Floats, Floats]:
    """How much of each object's colour every pixel holds, [f h w] each, at least 0 (least squares)."""
    palette = _palette_hues()
    one = np.maximum(hues @ palette[first], 0)
    if small is None:
        return one, np.zeros_like(one)
    other = np.maximum(hues @ palette[small], 0)
    cosine = float(palette[first] @ palette[small])
    if cosine < -0.99:
        return one, other
    both = hues @ np.linalg.inv(np.stack([palette[first], palette[small]], 1)).T
    mixed = (both >= 0).all(-1)
    nearer = one >= other
    return (
        np.where(mixed, both[..., 0], one * nearer).astype(np.float32),
        np.where(mixed, both[..., 1], other * ~nearer).astype(np.float32),
    )


def _find(share: Floats, weight: Floats, sizes: Floats, config: WorldConfig) -> ObjectReadings:
    """Where in each frame the object lies, how large it is and which shape departs least from its share [f h w].

    The departure from a template T at offset d is sum(w (m - T_d)^2), of which sum(w m^2) is the same for all; the rest
    are two correlations, for all offsets at once by Fourier transforms.
    """
    frames, size_px = len(share), config.size_px
    chroma = _brightest(share * weight, config)
    present = (chroma >= FAINTEST) & ((share * weight).sum((1, 2)) > 8 * config.scale**2 * chroma)
    mask = np.clip(share / np.maximum(DARKEST * chroma, FAINTEST * DARKEST)[:, None, None], 0, 1)
    own = (weight * mask * mask).sum((1, 2))
    seen, weights = (torch.fft.rfft2(torch.from_numpy(image)) for image in (weight * mask, weight))
    errors = np.empty((len(SHAPES), len(sizes), frames), np.float32)
    offsets = np.empty((len(SHAPES), len(sizes), frames, 2), np.float32)
    for place, shape in enumerate(SHAPES):
        for number, (minus_twice, square) in enumerate(_spectra(shape, tuple(sizes.tolist()), config)):
            surface = torch.fft.irfft2(torch.addcmul(weights * square, seen, minus_twice), s=(size_px, size_px))
            errors[place, number], offsets[place, number] = _lowest(surface.numpy(), size_px)
    errors = (errors + own) / (100 * (sizes * config.scale) ** 2)[None, :, None].astype(np.float32)
    best_size = errors.argmin(1)  # [shapes f]
    by_shape = np.take_along_axis(errors, best_size[:, None], 1)[:, 0].T * present[:, None]
    chosen = int(by_shape.sum(0).argmin())
    number = best_size[chosen]
    centre = size_px / 2 + offsets[chosen, number, np.arange(frames)]
    size = _refined(errors[chosen], number, sizes)
    return ObjectReadings(present, centre.astype(np.float32), size, by_shape, chroma * present)


@functools.cache
def _spectra(shape: str, sizes: tuple[float, ...], config: WorldConfig) -> list[tuple[Tensor, Tensor]]:
    """Of a shape's template in each size, in the middle of the picture: the conjugate spectra of minus twice the
    template and of its square, `[h w/2+1]` each."""
    middle = np.full((len(sizes), 2), config.size_px / 2, np.float32)
    templates = torch.from_numpy(_as_mask(cover(shape, "plain", middle, np.asarray(sizes, np.float32), config)[0]))
    return [
        (-2 * torch.fft.rfft2(one).conj().resolve_conj(), torch.fft.rfft2(one * one).conj().resolve_conj())
        for one in templates
    ]


def _brightest(share: Floats, config: WorldConfig) -> Floats:
    """Mean of each frame's pixels that are nearly as coloured as its few most coloured ones, [f]."""
    flat = share.reshape(len(share), -1)
    few = max(int(3 * config.scale**2), 2)
    peak = np.partition(flat, -few, axis=1)[:, -few:].mean(1, keepdims=True)
    bright = flat >= BRIGHT_SHARE * peak
    return (flat * bright).sum(1) / np.maximum(bright.sum(1), 1)


def _as_mask(coverage: Floats) -> Floats:
    return np.clip(_smooth(coverage) / np.float32(DARKEST), 0, 1)


def _lowest(surface: Floats, size_px: int) -> tuple[Floats, Floats]:
    """Lowest value of each frame's surface over offsets, [f], and the offset (x, y) in pixels to a fraction, [f 2]."""
    flat = surface.reshape(len(surface), -1)
    place = flat.argmin(1)
    frames = np.arange(len(surface))
    row, column = np.divmod(place, size_px)
    middle = flat[frames, place]

    def fraction(before: Floats, after: Floats) -> Floats:
        return (before - after) / np.maximum(2 * (before - 2 * middle + after), 1e-9)

    x = fraction(surface[frames, row, column - 1], surface[frames, row, (column + 1) % size_px])
    y = fraction(surface[frames, row - 1, column], surface[frames, (row + 1) % size_px, column])
    offset = np.stack([column + np.clip(x, -0.5, 0.5), row + np.clip(y, -0.5, 0.5)], 1)
    return middle, ((offset + size_px / 2) % size_px - size_px / 2).astype(np.float32)


def _refined(errors: Floats, number: NDArray[np.int64], sizes: Floats) -> Floats:
    """Size of least error, [f], by a parabola through its neighbours' errors [sizes f]."""
    inner = np.clip(number, 1, len(sizes) - 2)
    frames = np.arange(errors.shape[1])
    before, middle, after = (errors[inner + step, frames] for step in (-1, 0, 1))
    step = (before - after) / np.maximum(2 * (before - 2 * middle + after), 1e-9)
    return (sizes[inner] + np.clip(step, -1, 1) * (sizes[1] - sizes[0])).astype(np.float32)


def _silhouette(found: ObjectReadings, grown: float, config: WorldConfig) -> Floats:
    """Share of each pixel that the object as it was found covers, `grown` times as large, [f h w]."""
    shape = SHAPES[int(found.shape_error.sum(0).argmin())]
    return cover(shape, "plain", found.centre_px, found.size * np.float32(grown), config)[0]


def _summarise(
    first: ObjectReadings,
    small: ObjectReadings | None,
    first_colour: int,
    small_colour: int | None,
    share: Floats,
    front: Floats,
    colours: Floats,
    config: WorldConfig,
    first_pixel_frame: int,
) -> TexturedReading:
    speeds = {name: _pixels(speed, config) for name, speed in SPEEDS_PX.items()}
    direction, speed = _motion(first, config, speeds)
    places, times = _track(first)
    smooth, steady = (smoothness(places, times, span, config) for span in (1, STRIDE_FRAMES))
    saturation = [float(np.quantile(first.chroma[first.present], 0.9))]
    small_shape = small_direction = None
    background = np.maximum(front, _silhouette(first, 1.3, config))
    if small is not None and small_colour is not None and 2 * small.present.sum() >= len(share):
        small_shape = SHAPES[int(small.shape_error.sum(0).argmin())]
        small_direction, _ = _motion(small, config, {"": _pixels(SMALL_SPEED_PX, config)})
        saturation.append(float(small.chroma[small.present].mean()))
    else:
        saturation.append(0.0)
    return TexturedReading(
        colour=tuple(PALETTE)[first_colour],
        shape=SHAPES[int(first.shape_error.sum(0).argmin())],
        direction=direction,
        speed=speed,
        texture=_texture(first, share, 1 - front, config),
        change=_change(first, config),
        small_colour=None if small_shape is None or small_colour is None else tuple(PALETTE)[small_colour],
        small_shape=small_shape,
        small_direction=small_direction,
        smoothness=smooth,
        steadiness=steady,
        saturation=float(np.mean(saturation)),
        ground=_ground(colours, background),
        first_pixel_frame=first_pixel_frame,
        pace_px=_pace(places, times),
        shape_errors=tuple(float(error) for error in first.shape_error.sum(0)),
    )


def _pace(places: NDArray[np.float64], times: Times) -> float:
    """Of the axis along which the object goes."""
    return pace(places[:, int(np.ptp(places, axis=0).argmax())], times) if len(times) > 1 else 0.0


def _pixels(speed_px: float, config: WorldConfig) -> float:
    return speed_px * config.scale * REFERENCE_FPS / config.fps


def _track(found: ObjectReadings) -> tuple[NDArray[np.float64], Times]:
    times = np.flatnonzero(found.present)
    return found.centre_px[times].astype(np.float64), times.astype(np.float64)


def _motion(found: ObjectReadings, config: WorldConfig, speeds: dict[str, float]) -> tuple[str | None, str | None]:
    places, times = _track(found)
    return read_box(places, times, config, speeds) if len(times) > 1 else (None, None)


def _texture(first: ObjectReadings, share: Floats, weight: Floats, config: WorldConfig) -> str:
    """The texture whose picture, at the place and size found, departs least from the object's share."""
    shape = SHAPES[int(first.shape_error.sum(0).argmin())]
    relative = share / np.maximum(first.chroma, FAINTEST)[:, None, None]
    errors = []
    for texture in TEXTURES:
        coverage, darkness = cover(shape, texture, first.centre_px, first.size, config)
        expected = _smooth(coverage * (1 - np.float32(DARKENING) * darkness))
        inner = weight * (coverage > 0.9) * first.present[:, None, None]
        errors.append(float((inner * (relative - expected) ** 2).sum()))
    return TEXTURES[int(np.argmin(errors))]


def _change(first: ObjectReadings, config: WorldConfig) -> str | None:
    """What swings with the world's period: the size, the colour's strength, or neither; None in a short clip."""
    _, times = _track(first)
    turns = times / (config.fps * PERIOD_S)
    if not tells_change(int(times[-1] - times[0]) + 1, config):
        return None
    waves = np.stack([np.ones_like(turns), np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], 1)

    def swing(values: Floats) -> float:
        mean, *wave = np.linalg.lstsq(waves, values[first.present].astype(np.float64), rcond=None)[0]
        return float(np.hypot(*wave) / max(mean, 1e-6))

    shares = {"pulsing": swing(first.size) / PULSE, "glowing": swing(first.chroma) / (GLOW / (2 - GLOW))}
    strongest = max(shares, key=shares.__getitem__)
    return strongest if shares[strongest] >= SWING_SHARE else CHANGES[0]


def _ground(colours: Floats, covered: Floats) -> float:
    """Contrast of what no object covers, as a share of the world's own."""
    grey = colours.mean(-1)
    weight = (covered < 0.05).astype(np.float32)
    count = np.maximum(weight.sum((1, 2)), 1)
    mean = (weight * grey).sum((1, 2)) / count
    variance = (weight * (grey - mean[:, None, None]) ** 2).sum((1, 2)) / count
    return float(np.sqrt(variance.mean()) / GROUND_AMPLITUDE)
