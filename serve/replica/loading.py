"""What a replica loads: a release in its engine, and how that is told to gateways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from diagonal.config import Config
from diagonal.engine.engine import Engine
from diagonal.files import file_hash
from diagonal.metrics import MetricsBackend
from diagonal.model.manifest import MANIFEST
from diagonal.model.release import Release
from diagonal.model.text import load_tokenizer, token_counts
from serve.provenance.watermarks import Watermarks
from serve.records import ModelInfo
from serve.replica.engine_thread import EngineLike
from serve.settings import ServeSettings


class Loaded(NamedTuple):
    """A release in its engine: the name that callers know it by, its configuration, whether it was promoted."""

    model: str
    config: Config
    engine: EngineLike
    promoted: bool = False
    manifest_sha256: str = ""
    count_tokens: Callable[[str], int] | None = None


def load_engine(settings: ServeSettings, metrics: MetricsBackend) -> Loaded:
    """The release, and an engine that holds it and has measured what its chunks cost.

    `ReleaseError` when it is not whole, or was not promoted and nobody said that it may be served all the same.
    """
    release = Release.load(settings.release or None).with_settings(settings.release_settings)
    if not settings.allow_unpromoted:
        release.check_promoted()
    engine = Engine(release, device=settings.device, metrics=metrics, encode_prompts_async=True)
    engine.warm_up()
    manifest_sha256 = file_hash(release.folder / MANIFEST)
    name, tokenizer = settings.model or release.name, load_tokenizer(release.folder / "tokenizer")
    count = partial(_count_tokens, tokenizer)
    return Loaded(name, release.config, engine, release.promoted, manifest_sha256, count)


def _count_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    return token_counts(tokenizer, [prompt])[0]


def describe(loaded: Loaded, marks: Watermarks) -> ModelInfo:
    """What callers may ask of it; sizes without room for the watermark are not offered."""
    geometry, limits = loaded.config.geometry, loaded.config.serve
    return ModelInfo(
        name=loaded.model,
        width=geometry.pixel_width,
        height=geometry.pixel_height,
        fps=geometry.pixel_fps,
        clip_frames=geometry.clip_pixel_frames,
        scales=marks.scales(tuple(dict.fromkeys((limits.pixel_scale, 1)))),
        max_frames=int(limits.max_seconds * geometry.pixel_fps),
        max_prompt_characters=limits.max_prompt_characters,
        max_prompt_tokens=loaded.config.model.text_tokens,
        lead_s=limits.playout_lead_s,
        promoted=loaded.promoted,
        geometry=geometry,
        release_sha256=loaded.manifest_sha256,
    )
