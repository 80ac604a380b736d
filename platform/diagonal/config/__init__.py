"""The configuration, saved beside every artefact: presets, `key=value` settings, JSON in and out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diagonal.config.data import PairsConfig, PromptsConfig
from diagonal.config.network import CacheConfig, DecoderConfig, ModelConfig, NetworkConfig
from diagonal.config.parse import assign, build, nearest
from diagonal.config.serving import ServeConfig
from diagonal.config.training import DistillConfig, OdeInitConfig, PretrainConfig, TrainConfig
from diagonal.errors import FieldError, require
from diagonal.geometry import ChunkGeometry
from diagonal.jsonfile import read_json, write_json
from diagonal.schedule import StepSchedule
from diagonal.setting import setting

EMBEDDED = {"tiny": "tiny", "tiny-textured": "textured"}  # presets, and the folder of each one's model in assets/


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; one object, saved beside every artefact."""

    preset: str = setting("wan-1.3b", "The preset that the other values began from.")
    seed: int = setting(0, "Seed of all random numbers.")
    geometry: ChunkGeometry = field(default_factory=ChunkGeometry)
    schedule: StepSchedule = field(default_factory=StepSchedule)
    cache: CacheConfig = field(default_factory=CacheConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    ode_init: OdeInitConfig = field(default_factory=OdeInitConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        chunk, cache = self.geometry.chunk_frames, self.cache
        least = cache.sink_frames + chunk
        require(
            cache.sink_frames >= 0 and cache.sink_frames % chunk == 0,
            "cache.sink_frames",
            cache.sink_frames,
            f"0 or a multiple of geometry.chunk_frames = {chunk}",
        )
        require(
            cache.window_frames % chunk == 0 and cache.window_frames >= least,
            "cache.window_frames",
            cache.window_frames,
            f"a multiple of geometry.chunk_frames = {chunk}, at least sink and current chunk = {least}",
        )
        # as stage 1, or an overloaded engine, runs them: the listed steps under the one context
        others = {"distill.stage1_steps": self.distill.stage1_steps, "serve.degraded_steps": self.serve.degraded_steps}
        for name, steps in others.items():
            try:
                if name.startswith("distill") or steps:
                    self.schedule.with_steps(steps)
            except FieldError as error:
                raise FieldError(name, steps, error.allowed) from error

    @classmethod
    def from_preset(cls, name: str, settings: Iterable[str] = ()) -> Config:
        """A preset with `key=value` settings applied, such as `distill.lr=1e-6`."""
        from diagonal.config.presets import PRESETS  # presets are made of this class

        require(name in PRESETS, "preset", name, f"one of {sorted(PRESETS)}{nearest(name, PRESETS)}")
        return PRESETS[name].with_settings(settings)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """The tree in `data`; an unknown key or a value of the wrong type raises `FieldError`."""
        return build(cls, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Config:
        """Read what `save` wrote; `FieldError` when it is missing, not JSON, or not such a tree."""
        return cls.from_dict(read_json(path))

    @property
    def is_embedded(self) -> bool:
        """Whether captions and clips come from an embedded world."""
        return self.preset in EMBEDDED

    @property
    def embedded_model(self) -> str:
        """The embedded model that an empty `model.path` means."""
        return EMBEDDED.get(self.preset, "tiny")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        write_json(path, self.to_dict())

    def with_settings(self, settings: Iterable[str]) -> Config:
        """A copy with each `dotted.key=value` applied; values are JSON, anything else is a string."""
        data = self.to_dict()
        for text in settings:
            key, equals, value = text.partition("=")
            require(bool(equals), "setting", text, "of the form dotted.key=value")
            assign(data, key.strip(), value.strip())
        return self.from_dict(data)
