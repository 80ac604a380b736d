"""The second embedded world: two objects with texture and slow changes over a random ground that drifts past.

On the first world two denoising steps draw everything and nothing wanders off. Here a frame holds what a single guess
blurs (stripes, a ring, the ground), something small in front, changes of four seconds' period, and at one edge always
new ground, which a stream has to invent: it can drift. Lengths are given for 32 px and speeds for 16 fps, as in
`data/world.py`, whose palette, shapes and directions it shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagonal.data.world import (
    DIRECTIONS,
    PALETTE,
    REFERENCE_FPS,
    SHAPES,
    Floats,
    Pixels,
    Seed,
    WorldConfig,
    bounced,
    reach_px,
    signed_distance,
)

TEXTURES = ("plain", "striped", "ringed")
CHANGES = ("steady", "pulsing", "glowing")
SPEEDS_PX: dict[str, float] = {"slowly": 0.25, "quickly": 0.7}  # of the first object, a pixel frame
SMALL_SPEED_PX = 0.45
FIRST_SIZE, SMALL_SIZE = 0.8, 0.5  # of the first world's shapes
START_RANGE_PX, SMALL_START_RANGE_PX = 4.0, 7.0
EDGE_SOFTNESS_PX = 1.5
PERIOD_S = 4.0
PULSE = 0.25  # a pulsing object's size goes this share up and down
GLOW = 0.5  # a glowing object goes this far towards white and back
DARKENING = 0.6  # stripes and rings are this much darker
STRIPE_PERIOD_PX, RING_RADIUS_PX = 7.0, 3.8  # on an object of size 1; stripes are upright
GROUND_LOW, GROUND_HIGH = 0.42, 0.58
GROUND_AMPLITUDE, GROUND_GRAIN_PX, GROUND_SPEED_PX = 0.06, 6.0, 0.3
HELD_OUT_EVERY = 19  # a prime above every attribute's count: each value is held out as often as another
CODE = (1, 2, 3, 5, 7, 11, 4, 6, 9)  # of the attributes, in their order


@dataclass(frozen=True)
class TexturedScene:
    """What a caption says: one value of each attribute; the small object has another colour than the first."""

    colour: str
    shape: str
    direction: str
    speed: str
    texture: str
    change: str
    small_colour: str
    small_shape: str
    small_direction: str

    def __post_init__(self) -> None:
        for field, allowed in ATTRIBUTES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} = {value!r}: must be one of {', '.join(allowed)}")
        if self.small_colour == self.colour:
            raise ValueError(f"small_colour = {self.small_colour!r}: must be another one than colour = {self.colour!r}")

    @property
    def caption(self) -> str:
        return (
            f"a {self.change} {self.texture} {self.colour} {self.shape} moving {self.direction} {self.speed} "
            f"and a small {self.small_colour} {self.small_shape} moving {self.small_direction}"
        )

    @classmethod
    def parse(cls, caption: str) -> TexturedScene:
        """Inverse of `caption`. ValueError when the sentence has another form or names an unknown value."""
        words = caption.split()
        fixed = [(0, "a"), (5, "moving"), (8, "and"), (9, "a"), (10, "small"), (13, "moving")]
        if len(words) != 15 or any(words[place] != word for place, word in fixed):
            raise ValueError(
                f"caption = {caption!r}: must read 'a CHANGE TEXTURE COLOUR SHAPE moving DIRECTION SPEED "
                "and a small COLOUR SHAPE moving DIRECTION'"
            )
        change, texture, colour, shape, _, direction, speed = words[1:8]
        return cls(colour, shape, direction, speed, texture, change, words[11], words[12], words[14])


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(PALETTE),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS_PX),
    "texture": TEXTURES,
    "change": CHANGES,
    "small_colour": tuple(PALETTE),
    "small_shape": SHAPES,
    "small_direction": tuple(DIRECTIONS),
}
SIZES = tuple(len(values) for values in ATTRIBUTES.values())


def scene_numbers(held_out: bool) -> NDArray[np.int64]:
    """Numbers of the scenes that training shows (73,664), or of those that it does not (4,096), see `scene_of`."""
    places = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES))
    kept_back = np.asarray(CODE) @ places % HELD_OUT_EVERY == 0
    return np.flatnonzero((places[0] != places[6]) & (kept_back == held_out))


def scene_of(number: int) -> TexturedScene:
    """The scene of that number among all combinations of the attributes."""
    places = np.unravel_index(number, SIZES)
    return TexturedScene(*(values[place] for values, place in zip(ATTRIBUTES.values(), places, strict=True)))


def draw_scenes(seed: int, count: int, held_out: bool = False) -> Iterator[TexturedScene]:
    """Yield `count` scenes, each of its kind once, in an order of the seed, before any comes again."""
    numbers = scene_numbers(held_out)
    for index in range(count):
        lap, place = divmod(index, len(numbers))
        if place == 0:
            order = np.random.default_rng([seed, 2, lap]).permutation(numbers)
        yield scene_of(order[place])


def sample_clips(
    seed: int, count: int, config: WorldConfig, scenes: Sequence[TexturedScene] | None = None
) -> tuple[list[str], Pixels]:
    """`count` captions and their clips, uint8 [n f h w 3], of `scenes` by turns (default: drawn from the training
    scenes). Clip i depends on (seed, i) alone."""
    chosen = list(draw_scenes(seed, count)) if scenes is None else [scenes[i % len(scenes)] for i in range(count)]
    clips = np.empty((count, config.pixel_frames, config.size_px, config.size_px, 3), np.uint8)
    for index, scene in enumerate(chosen):
        clips[index] = render(scene, [seed, 1, index], config)
    return [scene.caption for scene in chosen], clips


def render(scene: TexturedScene, seed: Seed, config: WorldConfig) -> Pixels:
    """One clip, uint8 [f h w 3]. The seed draws where both objects start, and the ground."""
    generator = np.random.default_rng(seed)
    starts = generator.uniform(-1, 1, (2, 2)) * [[START_RANGE_PX], [SMALL_START_RANGE_PX]]
    ground = draw_ground(generator, config)
    size, glow = changes(scene.change, config)
    places = track(scene.shape, scene.direction, SPEEDS_PX[scene.speed], FIRST_SIZE * (1 + PULSE), starts[0], config)
    coverage, darkness = cover(scene.shape, scene.texture, places, FIRST_SIZE * size, config)
    small = track(scene.small_shape, scene.small_direction, SMALL_SPEED_PX, SMALL_SIZE, starts[1], config)
    front, _ = cover(scene.small_shape, "plain", small, np.full(config.pixel_frames, SMALL_SIZE, np.float32), config)
    share = (1 - np.float32(DARKENING) * darkness) * (1 - glow)[:, None, None]
    clip = np.empty((*ground.shape, 3), np.float32)
    for channel in range(3):
        colour = share * np.float32(PALETTE[scene.colour][channel]) + glow[:, None, None]
        behind = ground + coverage * (colour - ground)
        clip[..., channel] = behind + front * (np.float32(PALETTE[scene.small_colour][channel]) - behind)
    return np.rint(255 * clip.clip(0, 1)).astype(np.uint8)


def changes(change: str, config: WorldConfig) -> tuple[Floats, Floats]:
    """Size (1 is the mean) and share of white of the first object in each pixel frame, [f] each."""
    turns = np.arange(config.pixel_frames) / (config.fps * PERIOD_S)
    size = 1 + PULSE * np.sin(2 * np.pi * turns) * (change == "pulsing")
    glow = GLOW * (0.5 - 0.5 * np.cos(2 * np.pi * turns)) * (change == "glowing")
    return size.astype(np.float32), glow.astype(np.float32)


def track(
    shape: str, direction: str, speed_px: float, size: float, start_px: NDArray[np.float64], config: WorldConfig
) -> Floats:
    """Centre (x, y) in each pixel frame, in pixels, [f 2], of an object that bounces; `start_px` is its start's offset.

    It starts on the side that it leaves, so that the first leg is long enough to be read.
    """
    heading = np.asarray(DIRECTIONS[direction], np.float64)
    travel = np.arange(config.pixel_frames)[:, None] * heading * speed_px * config.scale * REFERENCE_FPS / config.fps
    behind = np.where(heading != 0, -heading * np.abs(start_px), start_px)
    low = reach_px(shape) * size * config.scale
    return bounced(config.size_px / 2 + behind * config.scale + travel, low, config.size_px)


def cover(shape: str, texture: str, centres: Floats, size: Floats, config: WorldConfig) -> tuple[Floats, Floats]:
    """Share of each pixel that the object covers, and how dark its texture is there, [f h w] each, in [0, 1].

    `centres` [f 2] are in pixels, `size` [f] is 1 for the first world's shapes.
    """
    grid = np.arange(config.size_px, dtype=np.float32) + np.float32(0.5)
    unit = (size * np.float32(config.scale))[:, None, None]
    x = (grid[None, None, :] - centres[:, 0, None, None]) / unit
    y = (grid[None, :, None] - centres[:, 1, None, None]) / unit
    inside = signed_distance(shape, x, y) * unit
    ramp = np.float32(max(EDGE_SOFTNESS_PX * config.scale, 1))
    return np.clip(np.float32(0.5) - inside / ramp, 0, 1), _darkness(texture, x, y)


def _darkness(texture: str, x: Floats, y: Floats) -> Floats:
    if texture == "striped":
        waves = np.clip(np.float32(1.6) * np.sin(x * np.float32(2 * np.pi / STRIPE_PERIOD_PX)), -1, 1)
        return np.broadcast_to(np.float32(0.5) + np.float32(0.5) * waves, np.broadcast_shapes(x.shape, y.shape))
    if texture == "ringed":
        return np.clip((np.float32(RING_RADIUS_PX) - np.sqrt(x * x + y * y)) / np.float32(1.5) + np.float32(0.5), 0, 1)
    return np.zeros((1, 1, 1), np.float32)


def draw_ground(generator: np.random.Generator, config: WorldConfig) -> Floats:
    """Grey levels [f h w] in [0, 1]: smooth noise that drifts to the left, so that new ground comes in at the right."""
    level = generator.uniform(GROUND_LOW, GROUND_HIGH)
    step = GROUND_SPEED_PX * config.scale * REFERENCE_FPS / config.fps
    passed = np.arange(config.pixel_frames) * step
    width = config.size_px + int(passed[-1]) + 2
    grain = GROUND_GRAIN_PX * config.scale
    margin = int(4 * grain)
    noise = generator.standard_normal((config.size_px, width + margin))  # the margin keeps the two ends apart
    frequencies = np.fft.fftfreq(config.size_px)[:, None] ** 2 + np.fft.rfftfreq(width + margin)[None] ** 2
    field = np.fft.irfft2(np.fft.rfft2(noise) * np.exp(-((np.pi * grain) ** 2) * frequencies), s=noise.shape)
    field = (level + GROUND_AMPLITUDE * field / field.std()).astype(np.float32)
    first = passed.astype(int)
    columns = first[:, None] + np.arange(config.size_px)
    share = (passed - first).astype(np.float32)[:, None]
    return ((1 - share) * field[:, columns] + share * field[:, columns + 1]).transpose(1, 0, 2)
