"""An embedded world as training and prompts see it: its words, its captions, and captioned clips to learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from diagonal.config import Config
from diagonal.data import textured, world
from diagonal.data.world import Pixels, WorldConfig, world_of
from diagonal.errors import require


@dataclass(frozen=True)
class EmbeddedWorld:
    """`captions(held_out)` yields every caption that training shows, or those that it never does; `sample(seed, count)`
    gives training captions and their clips, uint8 [n f h w 3]."""

    config: WorldConfig
    words: frozenset[str]
    captions: Callable[[bool], Iterator[str]]
    sample: Callable[[int, int], tuple[list[str], Pixels]]


def embedded_world(config: Config) -> EmbeddedWorld:
    """The world that a preset with embedded data draws from; `FieldError` for another preset."""
    require(config.is_embedded, "preset", config.preset, "one whose data is embedded, such as 'tiny'")
    return _textured(config) if config.pretrain.world == "textured" else _shapes(config)


def _shapes(config: Config) -> EmbeddedWorld:
    size = world_of(config)

    def captions(held_out: bool) -> Iterator[str]:
        return (scene.caption for scene in (world.held_out_scenes() if held_out else world.training_scenes()))

    words = frozenset(word for scene in world.all_scenes() for word in scene.caption.split())
    return EmbeddedWorld(size, words, captions, lambda seed, count: world.sample_clips(seed, count, size))


def _textured(config: Config) -> EmbeddedWorld:
    size = textured_size(config)

    def captions(held_out: bool) -> Iterator[str]:
        return (textured.scene_of(number).caption for number in textured.scene_numbers(held_out))

    values = {value for allowed in textured.ATTRIBUTES.values() for value in allowed}
    words = frozenset(values | set(next(textured.draw_scenes(0, 1)).caption.split()))
    return EmbeddedWorld(size, words, captions, lambda seed, count: textured.sample_clips(seed, count, size))


def textured_size(config: Config) -> WorldConfig:
    """Size, length and rate of the textured world for a model's geometry: a box, as its objects bounce."""
    return replace(world_of(config), edge="bounce")
