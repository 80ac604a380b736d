"""Prompts: reading, normalising, de-duplicating, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from diagonal.diffusion.noise import generator
from diagonal.errors import FieldError, require

SUFFIXES = (".txt", ".jsonl", ".parquet")


def normalise(prompt: str) -> str:
    """One form for one prompt: NFC, white space folded."""
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def prompt_id(prompt: str) -> str:
    """A stable id: the first 16 hexadecimal digits of the normalised prompt's sha256."""
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16]


def distinct(prompts: Iterable[str]) -> list[str]:
    """Normalised prompts in their first order, without empty ones and repetitions."""
    return list(dict.fromkeys(p for p in map(normalise, prompts) if p))


def load_prompts(uri: str) -> list[str]:
    """Distinct prompts of a file, local or s3://: `.txt` one a line, `.jsonl` and `.parquet` with a field `prompt`.

    `FieldError` names the file, or the line or row of it, that is not so.
    """
    require(uri.endswith(SUFFIXES), "prompts", uri, f"a file ending in one of {SUFFIXES}")
    filesystem, path = fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)
    require(filesystem.get_file_info(path).type == fs.FileType.File, "prompts", uri, "a file that exists")
    if uri.endswith(".parquet"):
        prompts = _parquet_prompts(filesystem, path, uri)
    else:
        with filesystem.open_input_stream(path) as stream:
            lines = _lines(stream.read(), uri)
        prompts = lines if uri.endswith(".txt") else _jsonl_prompts(lines, uri)
    found = distinct(prompts)
    require(bool(found), "prompts", uri, "a file with at least one prompt")
    return found


def _lines(data: bytes, uri: str) -> list[str]:
    try:
        return data.decode("utf-8-sig").split("\n")  # not splitlines: a JSON text may hold other separators
    except UnicodeDecodeError as error:
        raise FieldError("prompts", uri, f"a text in UTF-8 ({error})") from error


def _parquet_prompts(filesystem: fs.FileSystem, path: str, uri: str) -> list[str]:
    try:
        table = pq.read_table(path, filesystem=filesystem, columns=["prompt"])
    except pa.ArrowInvalid as error:
        raise FieldError("prompts", uri, 'a Parquet file with a column "prompt"') from error
    return [_text(value, f"{uri}, row {row}") for row, value in enumerate(table["prompt"].to_pylist())]


def _jsonl_prompts(lines: Sequence[str], uri: str) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{uri}, line {number}"
            try:
                value = json.loads(line)["prompt"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise FieldError(place, line[:80], 'a JSON object with a field "prompt"') from error
            prompts.append(_text(value, place))
    return prompts


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise FieldError(place, value, "a prompt that is a text")
    return value


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends on (seed, epoch) alone."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


def samples(count: int, seed: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(global sample number, index of the item it reads) for samples start to stop, epoch after epoch."""
    order: Sequence[int] = ()
    epoch = -1
    for sample in range(start, stop):
        if sample // count != epoch:
            epoch = sample // count
            order = epoch_order(count, seed, epoch)
        yield sample, order[sample % count]
