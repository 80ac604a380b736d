"""The embedded moving-shapes world: procedural captioned clips, each a pure function of scene, seed and config.

A coloured shape moves over a grey background. Lengths are given for 32 px and scale with `size_px`; speeds are
given for 16 fps and scale with `fps`, so that one caption looks the same at every size and rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagonal.config import Config

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Seed = int | Sequence[int]

REFERENCE_PX = 32
REFERENCE_FPS = 16
# The channels stay inside [0.12, 0.88]: a model that oversaturates has head-room to show it.
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.12, 0.88, 0.12),
    "blue": (0.12, 0.12, 0.88),
    "yellow": (0.88, 0.88, 0.12),
    "cyan": (0.12, 0.88, 0.88),
    "magenta": (0.88, 0.12, 0.88),
}
SHAPES = ("circle", "square", "triangle")
# x grows to the right, y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS_PX: dict[str, float] = {"slowly": 0.4, "quickly": 1.0}  # a pixel frame, at 32 px and 16 fps
EDGES = ("wrap", "bounce")

CIRCLE_RADIUS_PX = 7.0
SQUARE_HALF_SIDE_PX = 7.5
TRIANGLE_CIRCUMRADIUS_PX = 11.0
START_RANGE_PX = 5.0
EDGE_SOFTNESS_PX = 2.5  # width of the ramp from shape to background
BACKGROUND_LOW, BACKGROUND_HIGH = 0.35, 0.65
GRADIENT_AMPLITUDE = 0.12
HELD_OUT_SCENES = 14


@dataclass(frozen=True)
class WorldConfig:
    """Size and length of the clips, and what happens where the shape meets the edge ("wrap" or "bounce")."""

    size_px: int = REFERENCE_PX
    pixel_frames: int = 81
    fps: int = REFERENCE_FPS
    edge: str = "wrap"

    def __post_init__(self) -> None:
        for field, low, high in (("size_px", 16, 512), ("pixel_frames", 1, 100_000), ("fps", 1, 240)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{field} = {value!r}: must be an integer from {low} to {high}")
        if self.edge not in EDGES:
            raise ValueError(f"edge = {self.edge!r}: must be one of {', '.join(EDGES)}")

    @property
    def scale(self) -> float:
        """Pixels of this config for one pixel of the 32 px world."""
        return self.size_px / REFERENCE_PX

    def speed_px(self, speed: str) -> float:
        """Distance that `speed` covers in one pixel frame, in pixels."""
        return SPEEDS_PX[speed] * self.scale * REFERENCE_FPS / self.fps


@dataclass(frozen=True)
class Scene:
    """What a caption says: one value of each attribute."""

    colour: str
    shape: str
    direction: str
    speed: str

    def __post_init__(self) -> None:
        for field, allowed in ATTRIBUTES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} = {value!r}: must be one of {', '.join(allowed)}")

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} {self.speed}"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """Inverse of `caption`. ValueError when the sentence has another form or names an unknown value."""
        words = caption.split()
        if len(words) != 6 or words[0] != "a" or words[3] != "moving":
            raise ValueError(f"caption = {caption!r}: must read 'a COLOUR SHAPE moving DIRECTION SPEED'")
        return cls(words[1], words[2], words[4], words[5])


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(PALETTE),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS_PX),
}


def world_of(config: Config) -> WorldConfig:
    """The world at the size, length and rate of a model's geometry."""
    geometry = config.geometry
    return WorldConfig(geometry.pixel_height, geometry.clip_pixel_frames, geometry.pixel_fps)


def all_scenes() -> tuple[Scene, ...]:
    """Every combination of the attributes, 144, in a fixed order."""
    return tuple(Scene(*values) for values in itertools.product(*ATTRIBUTES.values()))


def held_out_scenes() -> tuple[Scene, ...]:
    """The 14 combinations that no training clip shows; each attribute's values are shared out evenly among them."""
    colours, shapes, directions, speeds = ATTRIBUTES.values()
    return tuple(
        Scene(colours[k % 6], shapes[(k + k // 6) % 3], directions[(k + k // 4) % 4], speeds[(k + k // 6) % 2])
        for k in range(HELD_OUT_SCENES)
    )


def training_scenes() -> tuple[Scene, ...]:
    """All scenes but the held-out ones."""
    held_out = set(held_out_scenes())
    return tuple(scene for scene in all_scenes() if scene not in held_out)


def render(scene: Scene, seed: Seed, config: WorldConfig) -> Pixels:
    """One clip, uint8 [f h w 3]. The seed draws the start position and the background."""
    generator = np.random.default_rng(seed)
    centres = track(scene, generator.uniform(-START_RANGE_PX, START_RANGE_PX, 2), config)
    coverage = cover(scene.shape, centres, config)[..., None]
    background = draw_background(generator, config)[None, :, :, None]
    colour = np.asarray(PALETTE[scene.colour], np.float32)
    return np.rint(255 * (background + coverage * (colour - background))).astype(np.uint8)


def sample_clips(
    seed: int, count: int, config: WorldConfig, scenes: Sequence[Scene] | None = None
) -> tuple[list[str], Pixels]:
    """`count` captions and their clips, uint8 [n f h w 3] (see `iterate_clips`)."""
    pairs = list(iterate_clips(seed, count, config, scenes))
    shape = (0, config.pixel_frames, config.size_px, config.size_px, 3)
    clips = np.stack([clip for _, clip in pairs]) if pairs else np.zeros(shape, np.uint8)
    return [caption for caption, _ in pairs], clips


def iterate_clips(
    seed: int, count: int, config: WorldConfig, scenes: Sequence[Scene] | None = None
) -> Iterator[tuple[str, Pixels]]:
    """Yield `count` pairs of caption and clip. Clip i depends on (seed, i) alone.

    Every scene (default: the training scenes) is shown once, in a shuffled order, before any is shown again.
    """
    chosen = training_scenes() if scenes is None else tuple(scenes)
    if not chosen:
        raise ValueError("scenes = (): must hold at least one scene")
    for index in range(count):
        lap, place = divmod(index, len(chosen))
        if place == 0:
            order = np.random.default_rng([seed, 0, lap]).permutation(len(chosen))
        scene = chosen[order[place]]
        yield scene.caption, render(scene, [seed, 1, index], config)


def track(scene: Scene, start_px: NDArray[np.float64], config: WorldConfig) -> Floats:
    """Centre (x, y) of the shape in each pixel frame, in pixels, [f 2]; `start_px` is the start's offset at 32 px.

    Where the shape bounces, it starts on the side that it leaves, so that the first leg is long enough to be read.
    """
    heading = np.asarray(DIRECTIONS[scene.direction], np.float64)
    frames = np.arange(config.pixel_frames)[:, None]
    travel = frames * heading * config.speed_px(scene.speed)
    if config.edge == "wrap":
        return ((config.size_px / 2 + start_px * config.scale + travel) % config.size_px).astype(np.float32)
    behind = np.where(heading != 0, -heading * np.abs(start_px), start_px)
    low = reach_px(scene.shape) * config.scale
    return bounced(config.size_px / 2 + behind * config.scale + travel, low, config.size_px)


def bounced(places_px: NDArray[np.float64], low_px: float, size_px: int) -> Floats:
    """Places along each axis folded into [low_px, size_px - low_px], as an object goes to and fro between walls."""
    span = size_px - 2 * low_px
    phase = (places_px - low_px) % (2 * span)
    return (low_px + span - np.abs(span - phase)).astype(np.float32)


def reach_px(shape: str) -> float:
    """Largest distance, along an axis, from the centre of a shape to its outline, in pixels at 32 px."""
    return {"circle": CIRCLE_RADIUS_PX, "square": SQUARE_HALF_SIDE_PX, "triangle": TRIANGLE_CIRCUMRADIUS_PX}[shape]


def cover(shape: str, centres: Floats, config: WorldConfig) -> Floats:
    """Share of each pixel that the shape covers, [f h w] in [0, 1]; `centres` [f 2] in pixels, on the torus."""
    half = config.size_px / 2
    grid = np.arange(config.size_px, dtype=np.float32) + 0.5
    offsets = (grid[None, None, :] - centres[:, :, None] + half) % config.size_px - half
    x, y = offsets[:, 0, None, :] / config.scale, offsets[:, 1, :, None] / config.scale
    ramp_px = max(EDGE_SOFTNESS_PX, 1 / config.scale)
    return np.clip(0.5 - signed_distance(shape, x, y) / ramp_px, 0, 1)


def signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Distance from the outline, negative inside, in pixels at 32 px; `x` and `y` are relative to the centroid."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - np.float32(CIRCLE_RADIUS_PX)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(SQUARE_HALF_SIDE_PX)
    # Upright and equilateral: its three sides lie half the circumradius away from the centroid.
    slanted = np.float32(np.sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(slanted, y) - np.float32(TRIANGLE_CIRCUMRADIUS_PX / 2)


def draw_background(generator: np.random.Generator, config: WorldConfig) -> Floats:
    """Grey levels [h w] in [0, 1]: plain for one half of the draws, else a soft linear gradient of any heading."""
    level = generator.uniform(BACKGROUND_LOW, BACKGROUND_HIGH)
    graded, angle = generator.integers(2), generator.uniform(0, 2 * np.pi)
    grid = (np.arange(config.size_px) + 0.5) / config.size_px - 0.5
    ramp = np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None]
    return (level + graded * GRADIENT_AMPLITUDE * ramp).astype(np.float32)
