"""Several sources of clips side by side: the same captions and noise, batch by batch, each batch kept by its hash."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagonal.config import Config
from diagonal.evaluate.quality.features import clip_features
from diagonal.evaluate.quality.serving_options import psnr_db
from diagonal.evaluate.quality.sources import CLIPS_PER_BATCH, Make
from diagonal.evaluate.quality.worlds import World
from diagonal.files import file_hash
from diagonal.geometry import ChunkGeometry
from diagonal.media.measures import frame_steps, measure
from diagonal.storage import Folder

FORMAT = 2  # of a part; another one makes all parts anew
EQUAL_DB = 100.0  # the PSNR of clips that are equal to the last bit
PICTURE = "picture_"
SMALLEST_STEP = 1e-4  # of luma: a picture that moves less stands still


@dataclass(frozen=True)
class Source:
    """Where clips come from: `identity` tells it apart from any other (weights, schedule, context), `load` gives the
    function that makes them; it is called once, and not at all where every part is kept already."""

    name: str
    identity: str
    forwards: float
    load: Callable[[], Make]

    @cached_property
    def make(self) -> Make:
        return self.load()


@dataclass
class Clips:
    """What was found of one source's clips: values by figure, one a clip, features `[n, d]`, and the time it took."""

    values: dict[str, list[float]] = field(default_factory=dict)
    features: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    pixel_frames: int = 0

    def add(self, part: Mapping[str, Any]) -> None:
        """Take in a further batch."""
        for name, values in part["values"].items():
            self.values.setdefault(name, []).extend(values)
        self.features += part["features"]
        self.seconds += part["seconds"]
        self.pixel_frames += part["pixel_frames"]

    @property
    def count(self) -> int:
        return len(self.features)

    @property
    def fps(self) -> float:
        """Pixel frames of all clips for each second of generating and decoding them, in batches."""
        return self.pixel_frames / self.seconds if self.seconds else math.nan

    @property
    def points(self) -> NDArray[np.float64]:
        return np.asarray(self.features, np.float64)


Seen = Callable[[str, int, Tensor], None]


def run_panel(
    sources: Sequence[Source],
    captions: Sequence[str],
    seeds: Sequence[int],
    parts: Folder,
    *,
    world: World | None = None,
    geometry: ChunkGeometry | None = None,
    reference: str = "",
    seen: Seen | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Clips]:
    """Values of every source's clips; those of `reference` (the first source) also give each clip's `psnr_db` to it.

    One batch of one source and of the reference is in memory at a time. A batch that a former run finished is read
    from `parts`. `seen(name, first, pixels)` is shown each batch when it is made.
    """
    found = {source.name: Clips() for source in sources}
    for first in range(0, len(captions), CLIPS_PER_BATCH):
        some, own = captions[first : first + CLIPS_PER_BATCH], seeds[first : first + CLIPS_PER_BATCH]
        names = {source.name: f"{part_hash(source, reference, some, own)}.json" for source in sources}
        absent = [source for source in sources if not parts.has(names[source.name])]
        wanted = next((_made(s, some, own) for s in sources if s.name == reference), None) if absent else None
        for source in absent:
            compared = source.name != reference
            pixels, seconds = _made(source, some, own) if compared or wanted is None else wanted
            part = read_clips(pixels, some, world, wanted[0] if wanted and compared else None, geometry)
            part["seconds"] = seconds
            parts.write_json(names[source.name], part)
            if seen is not None:
                seen(source.name, first, pixels)
        for source in sources:
            found[source.name].add(parts.read_json(names[source.name]))
        say(f"{min(first + CLIPS_PER_BATCH, len(captions))} of {len(captions)} clips of {len(sources)} sources")
    return found


def _made(source: Source, captions: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, float]:
    """A batch of a source's clips, and the seconds that it took; its networks are loaded before."""
    make = source.make
    began_s = time.perf_counter()
    return make(captions, seeds), time.perf_counter() - began_s


def part_hash(source: Source, reference: str, captions: Sequence[str], seeds: Sequence[int]) -> str:
    """What a batch's file is named after: everything that its values depend on."""
    return digest([FORMAT, source.identity, reference, list(captions), list(seeds)])


def digest(value: object) -> str:
    """24 hexadecimal digits of a value that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def identity(folder: Path, config: Config, *more: object) -> str:
    """What tells a source apart: its weights, and the settings that decide its clips."""
    weights = {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("*.safetensors"))}
    tree = config.to_dict()
    settings = [tree[name] for name in ("preset", "geometry", "schedule", "cache", "model")]
    return digest([weights, *settings, tree["serve"]["decoder"], *more])


def read_clips(
    pixels: Tensor,
    captions: Sequence[str],
    world: World | None,
    wanted: Tensor | None = None,
    geometry: ChunkGeometry | None = None,
) -> dict[str, Any]:
    """Every figure of clips `[b, f, h, w, 3]` uint8: the oracle's, those of the pictures alone, PSNR to `wanted`; with
    a geometry also what chunks did to motion."""
    rows = [
        {**figures(clip.numpy(), caption, world), **(chunk_motion(clip.numpy(), geometry) if geometry else {})}
        for clip, caption in zip(pixels, captions, strict=True)
    ]
    values = {name: [round(row[name], 6) for row in rows] for name in rows[0]}
    if wanted is not None:
        pairs = zip(pixels, wanted, strict=True)
        values["psnr_db"] = [round(min(psnr_db(ours, theirs), EQUAL_DB), 4) for ours, theirs in pairs]
    features = torch.round(clip_features(pixels), decimals=6).tolist()
    return {"values": values, "features": features, "pixel_frames": pixels.shape[0] * pixels.shape[1]}


def chunk_motion(pixels: Any, geometry: ChunkGeometry) -> dict[str, float]:
    """Of a whole clip `[f, h, w, 3]`: `seam`, the mean change of luma from latent frame to latent frame where a chunk
    begins over that within chunks (1 where nobody could tell where chunks begin); and `motion_inside`, the mean change
    between pixel frames with those steps left out."""
    steps = frame_steps(pixels)
    borders = [geometry.pixel_start(chunk) - 1 for chunk in range(1, geometry.clip_chunks)]
    latent = range(geometry.temporal_stride, len(steps), geometry.temporal_stride)
    inside = [step for step in latent if step not in borders]
    rest = np.delete(steps, borders)
    seam = steps[borders].mean() / max(steps[inside].mean(), SMALLEST_STEP)
    return {"seam": float(seam), "motion_inside": float(rest.mean())}


def figures(pixels: Any, caption: str, world: World | None, first_pixel_frame: int = 0) -> dict[str, float]:
    """Figures of one piece of a clip `[f, h, w, 3]`: the oracle's where there is a world, and the picture's own."""
    found = dict(world.score(pixels, caption, first_pixel_frame)) if world else {}
    return {**found, **{PICTURE + name: value for name, value in asdict(measure(pixels)).items()}}
