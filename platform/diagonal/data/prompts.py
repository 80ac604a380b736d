"""Prompts: reading files of any length, one form and one id for each, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from diagonal.diffusion.noise import Salt, generator
from diagonal.errors import FieldError, require
from diagonal.model.text import clean_prompt
from diagonal.storage import Folder
from diagonal.storage.remote import location

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE_BYTES = 2**20
ROWS_AT_ONCE = 1024
ID_RANGE = 2**64


def prompt_id(prompt: str) -> str:
    """A stable id: the first 16 hexadecimal digits of the cleaned prompt's sha256."""
    return hashlib.sha256(clean_prompt(prompt).encode()).hexdigest()[:16]


def is_held_out(identity: str, share: float) -> bool:
    """Whether the prompt of that id is kept from training: a function of the id alone, for about `share` of them."""
    return int(identity, 16) < share * ID_RANGE


def read_prompts(uri: str, patience_s: float = 120.0) -> Iterator[str]:
    """Prompts as they stand in a file, or in a folder's files by name, local or s3://, in memory for a piece of it.

    `.txt` holds one a line; `.jsonl` and `.parquet` have a field `prompt`. `FieldError` names the file, or the line or
    row of it, that is not so.
    """
    whole = Folder(location(uri, "datasets"), patience_s)
    folder, names = (whole.parent, [whole.name]) if whole.parent.has(whole.name) else (whole, _inside(whole, uri))
    for name in names:
        place = uri if folder != whole else f"{uri.rstrip('/')}/{name}"
        require(name.endswith(SUFFIXES), "prompts", uri, f"a file ending in one of {SUFFIXES}")
        with folder.open(name) as file:
            if name.endswith(".parquet"):
                yield from _parquet_prompts(file, place)
            else:
                yield from _line_prompts(file, place, _jsonl_prompt if name.endswith(".jsonl") else _line_prompt)


def _inside(folder: Folder, uri: str) -> list[str]:
    found = [name for name in folder.children() if name.endswith(SUFFIXES)]
    allowed = f"a file that exists, or a folder of files, ending in one of {SUFFIXES}"
    require(bool(found) and bool(uri), "prompts", uri, allowed)
    return found


def _line_prompts(file: pa.NativeFile, place: str, read: Callable[[str, str], str]) -> Iterator[str]:
    for number, line in enumerate(_lines(file, place), 1):
        where = f"{place}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise FieldError(where, line[:80], f"a text in UTF-8 ({error})") from error
        yield read(text, where)


def _lines(file: pa.NativeFile, place: str) -> Iterator[bytes]:
    """Lines that end at a line feed alone: a JSON text may hold other separators."""
    rest, number = b"", 0
    while piece := file.read(PIECE_BYTES):
        *whole, rest = (rest + piece).split(b"\n")
        number += len(whole)
        yield from whole
        require(len(rest) <= PIECE_BYTES, f"{place}, line {number + 1}", rest[:80], f"at most {PIECE_BYTES} bytes")
    if rest:
        yield rest


def _line_prompt(line: str, where: str) -> str:
    return line


def _jsonl_prompt(line: str, where: str) -> str:
    if not line.strip():
        return ""
    try:
        value = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FieldError(where, line[:80], 'a JSON object with a field "prompt"') from error
    return _text(value, where)


def _parquet_prompts(file: pa.NativeFile, place: str) -> Iterator[str]:
    try:
        table = pq.ParquetFile(file)
        require("prompt" in table.schema_arrow.names, "prompts", place, 'a Parquet file with a column "prompt"')
        row = 0
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=["prompt"]):
            for value in batch.column(0).to_pylist():
                yield _text(value, f"{place}, row {row}")
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise FieldError("prompts", place, f"a Parquet file that can be read ({error})") from error


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise FieldError(where, value, "a prompt that is a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half a character
        raise FieldError(where, value[:80], f"a text in Unicode ({error})") from error
    return value


class SeenIds:
    """A set of 64-bit ids in 8 bytes each: sorted runs, merged with those that are no longer."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def add(self, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add ids `[n]`; returns `[n]`, true for the first of each that was not in the set."""
        unique, first = np.unique(ids, return_index=True)
        known = np.zeros(len(unique), dtype=bool)
        for run in self._runs:
            known |= run[np.minimum(np.searchsorted(run, unique), len(run) - 1)] == unique
        new, fresh = unique[~known], np.zeros(len(ids), dtype=bool)
        fresh[first[~known]] = True
        while len(new) and self._runs and len(self._runs[-1]) <= len(new):
            new = np.sort(np.concatenate((self._runs.pop(), new)))
        if len(new):
            self._runs.append(new)
        return fresh


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on (seed, epoch) alone."""
    return torch.randperm(count, generator=generator(seed, Salt.ORDER, epoch)).numpy()


class Order:
    """Which of `count` items each global sample number reads, epoch after epoch; holds one epoch's permutation."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, sample: int) -> int:
        epoch, place = divmod(sample, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._count, self._seed, epoch)
        return int(self._order[place])


def samples(count: int, seed: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(global sample number, index of the item it reads) for samples start to stop, epoch after epoch."""
    order = Order(count, seed)
    return ((sample, order[sample]) for sample in range(start, stop))
