"""The oracle of the embedded world: reads colour, shape, motion and saturation back from pixels alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diagonal.data.motion import STRIDE_FRAMES, Speeds, Times, Track, moving_mean, nearest_speed, read_box, smoothness
from diagonal.data.world import DIRECTIONS, PALETTE, SHAPES, SPEEDS_PX, Floats, Pixels, Scene, WorldConfig, cover

if TYPE_CHECKING:
    pass

FAINTEST_CHROMA = 0.15  # a frame whose object is greyer than this holds no object
OBJECT_QUANTILE = 0.95  # every shape covers more than 5 % of a frame, so this quantile lies on it
MASK_SHARE, CORE_SHARE = 0.35, 0.9  # of the object's chroma: what counts as object, and as its core


@dataclass(frozen=True)
class FrameReadings:
    """What each pixel frame shows on its own; `first_pixel_frame` is where these frames stand in their clip."""

    config: WorldConfig
    first_pixel_frame: int
    present: NDArray[np.bool_]  # [f]
    centroid_px: Floats  # [f 2], x and y
    colour_match: Floats  # [f 6], cosine to each palette colour's hue; 0 where absent
    shape_match: Floats  # [f 3], soft intersection over union with each shape; 0 where absent
    saturation: Floats  # [f], share of the palette colour's chroma; 0 where absent


@dataclass(frozen=True)
class Reading:
    """What a clip shows: None for an attribute that cannot be seen; every measure is 0 where there is no object.

    `smoothness` in (0, 1] falls with the jitter of the velocity from frame to frame, `steadiness` with that from one
    latent frame to the next, which a codec's blur inside a latent frame leaves alone. `saturation` is 1 where the
    object is as colourful as the palette, more where it is oversaturated.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    speed: str | None
    smoothness: float
    steadiness: float
    saturation: float
    frames: FrameReadings

    def cut(self, start: int, stop: int) -> Reading:
        """The reading of pixel frames [start, stop) alone."""
        old = self.frames
        piece = slice(start, stop)
        return summarise(
            FrameReadings(
                old.config,
                old.first_pixel_frame + len(old.present[:start]),
                old.present[piece],
                old.centroid_px[piece],
                old.colour_match[piece],
                old.shape_match[piece],
                old.saturation[piece],
            )
        )


@dataclass(frozen=True)
class Scores:
    """Agreement of a reading with a scene: 0 or 1 for the attributes, the measures as they were read."""

    colour: float
    shape: float
    direction: float
    speed: float
    smoothness: float
    steadiness: float
    saturation: float


def read_clip(pixels: Pixels, config: WorldConfig) -> Reading:
    """Read a clip, uint8 [f h w 3] of any length, from its pixels alone.

    ValueError when the clip is not uint8 or not of the config's size.
    """
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (config.size_px, config.size_px, 3):
        raise ValueError(
            f"pixels = {pixels.dtype} {pixels.shape}: must be uint8 (frames, {config.size_px}, {config.size_px}, 3)"
        )
    return summarise(read_frames(pixels, config))


def score(reading: Reading, scene: Scene) -> Scores:
    """Compare a reading with what its caption promised.

    A piece that starts after a clip's first frame may lie on any leg of a bouncing track: there the axis counts.
    """
    direction = float(reading.direction == scene.direction)
    if reading.direction and reading.frames.config.edge == "bounce" and reading.frames.first_pixel_frame > 0:
        seen, promised = DIRECTIONS[reading.direction], DIRECTIONS[scene.direction]
        direction = float(np.abs(seen).tolist() == np.abs(promised).tolist())
    return Scores(
        colour=float(reading.colour == scene.colour),
        shape=float(reading.shape == scene.shape),
        direction=direction,
        speed=float(reading.speed == scene.speed),
        smoothness=reading.smoothness,
        steadiness=reading.steadiness,
        saturation=reading.saturation,
    )


def read_frames(pixels: Pixels, config: WorldConfig) -> FrameReadings:
    """Measure each pixel frame of a clip, uint8 [f h w 3]."""
    colours = _smooth(pixels.astype(np.float32) / np.float32(255))
    chroma = colours.max(-1) - colours.min(-1)
    by_frame = chroma.reshape(len(chroma), config.size_px**2)
    peak = np.quantile(by_frame, OBJECT_QUANTILE, axis=1, method="nearest").astype(np.float32)
    present = peak >= FAINTEST_CHROMA
    peak = np.maximum(peak, FAINTEST_CHROMA)[:, None, None]
    centroid = _centroid(np.maximum(chroma - MASK_SHARE * peak, 0), config)
    core = (chroma >= CORE_SHARE * peak).astype(np.float32)
    core_colour = np.einsum("fhw,fhwc->fc", core, colours) / np.maximum(core.sum((1, 2)), 1)[:, None]
    colour_match, saturation = _match_colour(core_colour)
    mask = _project(colours, core_colour)
    shape_match = _match_shape(mask, centroid, config)
    seen = present[:, None]
    return FrameReadings(config, 0, present, centroid, colour_match * seen, shape_match * seen, saturation * present)


def _smooth(images: Floats) -> Floats:
    """Mean over 3 x 3 pixels, on the torus: takes two thirds of the noise away, moves no centroid."""
    for axis in (1, 2):
        images = (np.roll(images, 1, axis) + images + np.roll(images, -1, axis)) / np.float32(3)
    return images


def _centroid(weight: Floats, config: WorldConfig) -> Floats:
    """Weighted centroid of each frame, in pixels, [f 2] (x, y): circular on the torus, ordinary in the box."""
    grid = np.arange(config.size_px, dtype=np.float32) + np.float32(0.5)
    profiles = weight.sum(1), weight.sum(2)  # along x, along y
    if config.edge == "wrap":
        angle = 2 * np.pi * grid / config.size_px
        turns = [np.arctan2(one @ np.sin(angle), one @ np.cos(angle)) / (2 * np.pi) for one in profiles]
        return np.stack(turns, 1).astype(np.float32) % 1 * np.float32(config.size_px)
    mass = np.maximum(weight.sum((1, 2)), 1e-6)
    return np.stack([one @ grid / mass for one in profiles], 1).astype(np.float32)


def _match_colour(core_colour: Floats) -> tuple[Floats, Floats]:
    """Cosine of each frame's hue to the palette's, [f 6], and chroma as a share of the nearest one's, [f]."""
    palette = np.asarray(list(PALETTE.values()), np.float32)
    hues, palette_hues = _hue(core_colour), _hue(palette)
    lengths = np.linalg.norm(hues, axis=1), np.linalg.norm(palette_hues, axis=1)
    match = (hues / np.maximum(lengths[0], 1e-6)[:, None]) @ (palette_hues / lengths[1][:, None]).T
    return match, lengths[0] / lengths[1][match.argmax(1)]


def _hue(colours: Floats) -> Floats:
    return colours - colours.mean(-1, keepdims=True)


def _project(colours: Floats, core_colour: Floats) -> Floats:
    """How far each pixel lies from grey (0) towards the frame's core colour (1), [f h w]."""
    hue = _hue(core_colour)
    unit = hue / np.maximum((hue * hue).sum(1, keepdims=True), 1e-6)
    return np.clip(np.einsum("fhwc,fc->fhw", colours, unit), 0, 1)  # grey is orthogonal to every hue


def _match_shape(mask: Floats, centroid: Floats, config: WorldConfig) -> Floats:
    """Soft intersection over union of each mask, moved to the middle, with each shape's template, [f 3]."""
    half = config.size_px / 2
    moved = _shift(mask, half - centroid)
    centre = np.full((1, 2), half, np.float32)
    templates = [_smooth(cover(shape, centre, config)) for shape in SHAPES]
    overlap = [np.minimum(moved, one).sum((1, 2)) / np.maximum(moved, one).sum((1, 2)) for one in templates]
    return np.stack(overlap, 1)


def _shift(images: Floats, offset_px: Floats) -> Floats:
    """Move each image on the torus by a sub-pixel offset (x, y), by the Fourier shift theorem."""
    size = images.shape[1]
    across, down = np.fft.rfftfreq(size), np.fft.fftfreq(size)
    turn_x = np.exp(-2j * np.pi * offset_px[:, 0, None] * across)[:, None, :]
    turn_y = np.exp(-2j * np.pi * offset_px[:, 1, None] * down)[:, :, None]
    moved = np.fft.irfft2(np.fft.rfft2(images) * turn_x * turn_y, s=(size, size))
    return np.clip(moved, 0, 1).astype(np.float32)


def summarise(frames: FrameReadings) -> Reading:
    """Join frame readings into one. An object that fewer than half of the frames show is not there."""
    count = len(frames.present)
    if count == 0 or 2 * frames.present.sum() < count:
        return Reading(None, None, None, None, 0.0, 0.0, 0.0, frames)
    colour = tuple(PALETTE)[int(frames.colour_match.sum(0).argmax())]
    shape = SHAPES[int(frames.shape_match.sum(0).argmax())]
    places = frames.centroid_px[frames.present].astype(np.float64)
    times = np.flatnonzero(frames.present).astype(np.float64)
    read_motion = _read_torus if frames.config.edge == "wrap" else read_box
    speeds = {name: frames.config.speed_px(name) for name in SPEEDS_PX}
    direction, speed = read_motion(places, times, frames.config, speeds) if len(times) > 1 else (None, None)
    smooth, steady = (smoothness(places, times, span, frames.config) for span in (1, STRIDE_FRAMES))
    return Reading(colour, shape, direction, speed, smooth, steady, float(frames.saturation.mean()), frames)


def _read_torus(places: Track, times: Times, config: WorldConfig, speeds: Speeds) -> tuple[str | None, str | None]:
    """The slope of the smoothed, unwrapped track gives direction and speed; a frame's error cannot turn it."""
    turns = np.angle(moving_mean(np.exp(2j * np.pi * places / config.size_px))) / (2 * np.pi)
    velocity = np.polyfit(times, np.unwrap(turns, axis=0, period=1) * config.size_px, 1)[0]
    along = {name: float(velocity @ heading) for name, heading in DIRECTIONS.items()}
    direction = max(along, key=along.__getitem__)
    speed = nearest_speed(along[direction], speeds)
    return (direction, speed) if speed else (None, None)
