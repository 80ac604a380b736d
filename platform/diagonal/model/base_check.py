"""Is a folder a base model of ours? Asked of headers and configurations, wherever the folder lies, before any work."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.model.base_model import CONFIG, PARTS, check_codec, check_transformer
from diagonal.model.stored_weights import check_weights, empty_network
from diagonal.model.text import TOKENIZER, load_tokenizer
from diagonal.storage import Folder
from diagonal.storage.fetch import NO_PROGRAMS

NETWORKS = ("transformer", "vae", "text_encoder")
_TEXT_TO_VIDEO = "a text-to-video model of Wan 2.1's kind: one WanTransformer3DModel"


def check_base(base: Folder, config: Config) -> PreTrainedTokenizerBase:
    """`FieldError` names what keeps a folder from being the base model of a configuration; returns its tokenizer.

    Of weights the headers alone are read. Each network is held to its config, and all of them to the geometry and to
    one another.
    """
    check_kind(base)
    with tempfile.TemporaryDirectory(prefix="diagonal-base-") as name:
        copy = Path(name)
        for part in NETWORKS:
            base.get(f"{part}/{CONFIG}", copy / part / CONFIG)
        check_transformer(copy, config)
        for file in (TOKENIZER, "tokenizer_config.json"):
            if base.has(f"tokenizer/{file}"):
                base.get(f"tokenizer/{file}", copy / "tokenizer" / file)
        tokenizer = load_tokenizer(copy / "tokenizer")
    check_codec(empty_network("vae", base.read_json(f"vae/{CONFIG}"), f"{base}/vae/{CONFIG}"), config)
    words = int(base.read_json(f"text_encoder/{CONFIG}").get("vocab_size", 0))
    require(len(tokenizer) <= words, "tokenizer", len(tokenizer), f"at most the text encoder's vocab_size = {words}")
    for part in NETWORKS:
        check_weights(base, part)
    return tokenizer


def check_kind(folder: Folder) -> None:
    """`FieldError` names another of Wan's models than text-to-video with one network."""
    layout: Mapping[str, Any] = folder.read_json(f"transformer/{CONFIG}")
    index: Mapping[str, Any] = folder.read_json("model_index.json") if folder.has("model_index.json") else {}
    second = index.get("transformer_2")
    experts = (isinstance(second, list) and any(second)) or (folder / "transformer_2").exists()
    kind, index_kind = str(layout.get("_class_name") or "WanTransformer3DModel"), str(index.get("_class_name") or "")
    found = next(
        (
            name
            for name, is_so in (
                ("Wan 2.2's two experts (transformer and transformer_2), of which one would be left out", experts),
                ("VACE", "VACE" in kind),
                ("SkyReels", kind.startswith("SkyReels")),
                (f"{kind}", kind not in ("WanTransformer3DModel", "CausalWan")),
                (f"image to video ({index_kind})", "ImageToVideo" in index_kind),
                ("image to video, or first and last frame (image_dim)", layout.get("image_dim") is not None),
                ("image to video (added_kv_proj_dim)", layout.get("added_kv_proj_dim") is not None),
                ("image to video or Fun, whose input has the image's channels", _has_image_channels(layout)),
            )
            if is_so
        ),
        "",
    )
    if found:
        raise FieldError("transformer", f"{folder}: {found}", _TEXT_TO_VIDEO)


def _has_image_channels(layout: Mapping[str, Any]) -> bool:
    channels = layout.get("in_channels", 16)
    return bool(channels != layout.get("out_channels", channels))


def stray_files(base: Folder) -> list[str]:
    """Files inside a base model's parts that are no part of a release: programs, pickles, what is hidden."""
    names = (name for name in base.files() if name.split("/")[0] in PARTS)
    return [name for name in names if not goes_into_a_release(name)]


def goes_into_a_release(name: str) -> bool:
    """Whether a base model's file is copied into a release: of a kind that runs no code, and not hidden."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and any(fnmatch(name, kind) for kind in NO_PROGRAMS)
