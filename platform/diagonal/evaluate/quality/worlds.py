"""The seam between evaluation and a world with an oracle: captions in, clips and named scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from diagonal.config import Config
from diagonal.data import textured, textured_oracle
from diagonal.data.embedded import textured_size
from diagonal.data.oracle import read_frames, score, summarise
from diagonal.data.textured import TexturedScene
from diagonal.data.world import ATTRIBUTES, Pixels, Scene, WorldConfig, all_scenes, held_out_scenes, render, world_of
from diagonal.errors import FieldError, require

# What each embedded codec leaves of the palette's colourfulness: measured on clips of the world itself (docs/log.md).
SHAPES_CHROMA, TEXTURED_CHROMA = 0.987, 0.929


class World(Protocol):
    """What evaluation asks of a world. Scores are in [0, 1] and higher is better; those in `rates` are 0 or 1 a clip.

    `shown` are further figures of the oracle that are shown and never judged.
    """

    @property
    def rates(self) -> tuple[str, ...]: ...

    @property
    def scores(self) -> tuple[str, ...]: ...

    @property
    def shown(self) -> tuple[str, ...]: ...

    @property
    def chance(self) -> Mapping[str, float]:
        """What guessing reaches in each rate of a whole clip."""
        ...

    def captions(self, held_out: bool = False) -> Sequence[str]:
        """All captions, or those that no training clip shows."""
        ...

    def check(self, caption: str) -> None:
        """`FieldError` for a caption that the oracle cannot read."""
        ...

    def changed(self, caption: str, number: int) -> str:
        """Another caption that differs in everything; `number` chooses among them."""
        ...

    def render(self, caption: str, seed: int) -> Pixels:
        """The world's own clip `[f, h, w, 3]`."""
        ...

    def score(self, pixels: Pixels, caption: str, first_pixel_frame: int = 0) -> Mapping[str, float]:
        """Every score and shown figure of a piece `[f, h, w, 3]` of a clip that begins at `first_pixel_frame`; a score
        that no piece of this length can tell is left out."""
        ...


@dataclass(frozen=True)
class ShapesWorld:
    """The embedded moving-shapes world. `saturation` is how near the object is to the colourfulness that the codec
    leaves of the palette's; `chroma` shows it (1 is the palette's, more is oversaturated)."""

    config: WorldConfig
    rates: tuple[str, ...] = tuple(ATTRIBUTES)
    scores: tuple[str, ...] = (*ATTRIBUTES, "smoothness", "steadiness", "saturation")
    shown: tuple[str, ...] = ("chroma",)

    @property
    def chance(self) -> Mapping[str, float]:
        return {name: 1 / len(values) for name, values in ATTRIBUTES.items()}

    def captions(self, held_out: bool = False) -> Sequence[str]:
        return [scene.caption for scene in (held_out_scenes() if held_out else all_scenes())]

    def check(self, caption: str) -> None:
        try:
            Scene.parse(caption)
        except ValueError as error:
            raise FieldError("prompt", caption, f"one that the world's oracle reads ({error})") from error

    def changed(self, caption: str, number: int) -> str:
        given = asdict(Scene.parse(caption))
        others = [s.caption for s in all_scenes() if all(asdict(s)[key] != value for key, value in given.items())]
        return others[number % len(others)]

    def render(self, caption: str, seed: int) -> Pixels:
        return render(Scene.parse(caption), seed, self.config)

    def score(self, pixels: Pixels, caption: str, first_pixel_frame: int = 0) -> Mapping[str, float]:
        side = self.config.size_px
        require(pixels.shape[1:] == (side, side, 3), "pixels.shape", pixels.shape, f"[f, {side}, {side}, 3]")
        frames = replace(read_frames(pixels, self.config), first_pixel_frame=first_pixel_frame)
        found = asdict(score(summarise(frames), Scene.parse(caption)))
        return {**found, "chroma": found["saturation"], "saturation": _nearness(found["saturation"], SHAPES_CHROMA)}


@dataclass(frozen=True)
class TexturedWorld:
    """The textured world. `saturation` is how near colourfulness is to what the codec leaves of the world's, `ground`
    how near the ground's contrast is to the world's; `chroma` and `contrast` show both (1 is the world's, more is too
    much). `pace` and `margin` are what hits in speed and shape hide (`TexturedScores`)."""

    config: WorldConfig
    rates: tuple[str, ...] = tuple(textured.ATTRIBUTES)
    scores: tuple[str, ...] = (*textured.ATTRIBUTES, "smoothness", "steadiness", "saturation", "ground")
    shown: tuple[str, ...] = ("chroma", "contrast", "pace", "margin")

    @property
    def chance(self) -> Mapping[str, float]:
        return {name: 1 / len(values) for name, values in textured.ATTRIBUTES.items()}

    def captions(self, held_out: bool = False) -> Sequence[str]:
        kinds = (True,) if held_out else (False, True)
        return [textured.scene_of(number).caption for kind in kinds for number in textured.scene_numbers(kind)]

    def check(self, caption: str) -> None:
        try:
            TexturedScene.parse(caption)
        except ValueError as error:
            raise FieldError("prompt", caption, f"one that the world's oracle reads ({error})") from error

    def changed(self, caption: str, number: int) -> str:
        old = asdict(TexturedScene.parse(caption))
        new: dict[str, str] = {}
        for name, values in textured.ATTRIBUTES.items():
            taken = {old[name], new["colour"]} if name == "small_colour" else {old[name]}
            others = [value for value in values if value not in taken]
            new[name] = others[number % len(others)]
        return TexturedScene(**new).caption

    def render(self, caption: str, seed: int) -> Pixels:
        return textured.render(TexturedScene.parse(caption), seed, self.config)

    def score(self, pixels: Pixels, caption: str, first_pixel_frame: int = 0) -> Mapping[str, float]:
        side = self.config.size_px
        require(pixels.shape[1:] == (side, side, 3), "pixels.shape", pixels.shape, f"[f, {side}, {side}, 3]")
        reading = textured_oracle.read_clip(pixels, self.config, first_pixel_frame)
        found = asdict(textured_oracle.score(reading, TexturedScene.parse(caption), self.config))
        own = {"saturation": TEXTURED_CHROMA, "ground": 1.0}
        near = {name: _nearness(found[name], level) for name, level in own.items()}
        if not textured_oracle.tells_change(len(pixels), self.config):
            del found["change"]
        return {**found, "chroma": found["saturation"], "contrast": found["ground"], **near}


def _nearness(found: float, wanted: float) -> float:
    return max(0.0, 1.0 - abs(1.0 - found / wanted))


def world_for(config: Config) -> World | None:
    """The world whose oracle judges this configuration's clips; None for a model of real video."""
    if not config.is_embedded:
        return None
    if config.pretrain.world == "textured":
        return TexturedWorld(textured_size(config))
    return ShapesWorld(world_of(config))
