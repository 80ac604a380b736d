"""Weights on disk, local or s3://, by the headers of their .safetensors files: names and shapes, without the values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from diagonal.errors import FieldError, require
from diagonal.model.architecture import constructor_settings, warn_of_unknown_settings
from diagonal.model.vae import LinearCodec
from diagonal.storage import Folder

CONFIG = "config.json"
CODECS = {"AutoencoderKLWan": AutoencoderKLWan, "LinearCodec": LinearCodec}
NETWORKS = {"transformer": WanTransformer3DModel, "text_encoder": UMT5EncoderModel}
TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # a file may hold umT5's token embedding under either name
SHOWN = 3
VARIANTS = ("fp16", "bf16")
_LENGTH_BYTES, _LONGEST_HEADER_BYTES = 8, 100_000_000

Shapes = dict[str, tuple[int, ...]]


def empty_network(part: str, config: Mapping[str, Any], source: str = CONFIG) -> Any:
    """The network that a part's config describes, without memory for its weights."""
    name = str(config.get("_class_name"))
    require(part != "vae" or name in CODECS, "vae._class_name", name, f"one of {sorted(CODECS)}")
    kind: Any = CODECS[name] if part == "vae" else NETWORKS[part]
    with torch.device("meta"):
        if kind is UMT5EncoderModel:
            return kind(UMT5Config.from_dict(config))
        warn_of_unknown_settings(kind, config, source)
        return kind(**constructor_settings(kind, config))


def check_weights(folder: Folder, part: str) -> None:
    """`FieldError` unless the weights in `folder/part` are those of the network that its config.json describes."""
    network = empty_network(part, folder.read_json(f"{part}/{CONFIG}"), f"{folder}/{part}/{CONFIG}")
    own = {TIED.get(key, key): tuple(value.shape) for key, value in network.state_dict().items()}
    stored = {TIED.get(key, key): shape for key, shape in stored_shapes(folder / part).items()}
    ignored = network._keys_to_ignore_on_load_unexpected or ()
    report = {
        "missing_keys": own.keys() - stored.keys(),
        "unexpected_keys": [k for k in stored.keys() - own.keys() if not any(re.search(each, k) for each in ignored)],
        "mismatched_keys": [f"{k} {list(stored[k])}" for k in own.keys() & stored.keys() if own[k] != stored[k]],
    }
    refuse_differences(report, part, str(folder / part))


def refuse_differences(report: Mapping[str, Iterable[Any]], part: str, where: str) -> None:
    """`FieldError` if a library's loading report names keys: it would draw what is missing or misshapen at random."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, report[problem]))
        require(not keys, f"{part} {problem}", keys[:SHOWN], f"none: weights and {CONFIG} of one network, in {where}")


def weights_name(part: str, variant: str | None = None) -> str:
    """The file that transformers, or diffusers, reads a part's weights from."""
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def index_name(part: str, variant: str | None = None) -> str:
    """The file that names the shards, where there are several."""
    plain = f"{weights_name(part)}.index"
    return f"{plain}.{variant}.json" if variant else f"{plain}.json"


def stored_variant(folder: Folder) -> str | None:
    """The variant by which the libraries find a part's weights: None, or `fp16` where there are no others."""
    names = set(folder.children())
    for variant in (None, *VARIANTS):
        if {weights_name(folder.name, variant), index_name(folder.name, variant)} & names:
            return variant
    there = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".index.json")))
    file = weights_name(folder.name)
    allowed = f"{file}, or {index_name(folder.name)} with its shards"
    only = f"; {there[:SHOWN]} is there: pickled weights are not read" if any(map(_is_pickled, there)) else ""
    raise FieldError(f"{folder.name} weights", str(folder), f"a folder with {allowed}{only}")


def _is_pickled(name: str) -> bool:
    return name.endswith((".bin", ".pt"))


def stored_shapes(folder: Folder) -> Shapes:
    """Shapes by name of the weights that the libraries would read; `FieldError` names a file that is not whole."""
    variant = stored_variant(folder)
    file, index = weights_name(folder.name, variant), index_name(folder.name, variant)
    if not folder.has(index):
        return _header_shapes(folder, file)
    places = folder.read_json(index).get("weight_map", {})
    shapes: Shapes = {}
    for shard in sorted(set(places.values())):
        shapes |= _header_shapes(folder, shard)
    absent = sorted(places.keys() - shapes.keys())
    require(not absent, f"{folder.name} missing_keys", absent[:SHOWN], f"none: their index names them, in {folder}")
    return shapes


def _header_shapes(folder: Folder, file: str) -> Shapes:
    whole, shapes = False, Shapes()
    with folder.open(file) as data:
        try:
            length = int.from_bytes(data.read(_LENGTH_BYTES), "little")
            header = json.loads(data.read(length)) if length < _LONGEST_HEADER_BYTES else {}
            header.pop("__metadata__", None)
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            end = max(entry["data_offsets"][1] for entry in header.values())
            whole = data.size() == _LENGTH_BYTES + length + end
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # said below
    where = f"{folder}/{file}"
    require(whole, f"{folder.name} weights", where, "a whole .safetensors file, not a Git LFS pointer or a part of one")
    return shapes
