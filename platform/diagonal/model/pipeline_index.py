"""What makes a release a folder that diffusers opens: its `model_index.json`, and the one line of code beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from diagonal.config import Config
from diagonal.jsonfile import read_json, write_json
from diagonal.model.manifest import PIPELINE, PIPELINE_CODE
from diagonal.model.stored_weights import CONFIG

INDEX = "model_index.json"
KEPT = ("preset", "geometry", "schedule", "cache", "model", "serve")  # of the configuration: what decides frames
_OURS = {
    "LinearCodec": "diagonal.model.vae",
    "FastDecoder": "diagonal.model.fast_decoder",
    "TaehvDecoder": "diagonal.model.taehv",
}
_TOKENIZER = ["transformers", "PreTrainedTokenizerFast"]  # reads tokenizer.json as it is; T5's own class rebuilds it


def kept_settings(name: str, config: Config) -> dict[str, Any]:
    """What a pipeline keeps of a release: its name, and the settings that decide its frames."""
    settings = config.to_dict()
    return {"name": name, "config": {section: settings[section] for section in KEPT}}


def write_pipeline_index(folder: Path, name: str, config: Config) -> None:
    """Write `model_index.json` and `pipeline.py` into a release's folder that has its networks."""
    parts: Mapping[str, Any] = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": _TOKENIZER,
        **{part: _class_of(folder / part) for part in ("vae", "scheduler", "decoder")},
    }
    written_by = {"_class_name": [PIPELINE.removesuffix(".py"), "DiagonalPipeline"]}
    version = {"_diffusers_version": diffusers.__version__}
    write_json(folder / INDEX, {**written_by, **version, **parts, "diagonal": kept_settings(name, config)})
    (folder / PIPELINE).write_text(PIPELINE_CODE)


def _class_of(part: Path) -> list[str | None]:
    """Library and class of a part, by its own config; none of each where the folder lacks it."""
    file = part / ("scheduler_config.json" if part.name == "scheduler" else CONFIG)
    if not file.is_file():
        return [None, None]
    kind = str(read_json(file)["_class_name"])
    return [_OURS.get(kind, "diffusers"), kind]
