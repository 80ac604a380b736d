"""Files that trainers of other projects leave: what they hold, in whatever format, without ever running their code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diagonal.errors import FieldError, require
from diagonal.files import file_hash
from diagonal.jsonfile import read_json

FIELD = "distill.init"
INDEXES = ("*.safetensors.index.json", "*.bin.index.json", "*.pt.index.json")
ALLOWED = "an existing folder with transformer/, or a .pt, .pth, .ckpt, .bin or .safetensors file, or its index"
SHARDED = (
    "whole tensors: it holds the DTensor or ShardedTensor shards of one process. Gather them where they were trained "
    "(get_model_state_dict with full_state_dict=True), and save that"
)
DISTRIBUTED = (
    "one file: it is a checkpoint of torch.distributed.checkpoint, of which `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER student.pt` makes one"
)
_NOT_WEIGHTS = {b"version https://git-lfs": "a Git LFS pointer", b"<!doctype": "a web page", b"<html": "a web page"}


def read_student_file(path: Path) -> Mapping[str, Any]:
    """What a file, an index of shards, or a folder of either holds; tensors are memory-mapped where they can be.

    `FieldError` says what a file is that holds no whole tensors: pickled code, a pointer, shards of one process.
    """
    shards = shards_of(path)
    if len(shards) == 1:
        return _read(shards[0])
    held: dict[str, Any] = {}
    for shard in shards:
        held.update(_read(shard))
    return held


def shards_of(path: Path) -> list[Path]:
    """The files that a student lies in, in order of name."""
    if path.is_dir():
        require(not (path / ".metadata").exists(), FIELD, str(path), DISTRIBUTED)
        found = [file for pattern in (*INDEXES, "*.safetensors", "*.pt") for file in sorted(path.glob(pattern))]
        require(bool(found), FIELD, str(path), ALLOWED)
        path = found[0]
    if not path.name.endswith(".index.json"):
        require(path.is_file(), FIELD, str(path), ALLOWED)
        return [path]
    files = [path.parent / name for name in sorted(set(read_json(path).get("weight_map", {}).values()))]
    missing = [file.name for file in files if not file.is_file()]
    require(bool(files) and not missing, f"{FIELD}: missing shards", missing, f"none: {path} names them")
    return files


def hashes(path: Path) -> dict[str, str]:
    """sha256 by name of the files that a student lies in."""
    return {file.name: file_hash(file) for file in shards_of(path)}


def _read(file: Path) -> Mapping[str, Any]:
    """One file's own content, by what it begins with."""
    with file.open("rb") as data:
        head = data.read(64).lstrip().lower()
    for start, kind in _NOT_WEIGHTS.items():
        require(not head.startswith(start), FIELD, str(file), f"a file of weights; this is {kind}")
    held = _safetensors(file) if file.suffix.lower() == ".safetensors" else _pickled(file)
    require(isinstance(held, Mapping), FIELD, type(held).__name__, f"a mapping of names to tensors in {file}")
    return held


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise FieldError(FIELD, str(file), f"a whole .safetensors file ({error})") from error


def _pickled(file: Path) -> Any:
    """What torch.save wrote, in its format of today or in the one before it, which cannot be mapped."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        require(not any(kind in str(error) for kind in ("DTensor", "ShardedTensor")), FIELD, str(file), SHARDED)
        raise FieldError(FIELD, str(file), f"a file of tensors alone; pickled code is not run ({reason})") from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise FieldError(FIELD, str(file), f"a file that torch.save wrote, whole ({reason})") from error
