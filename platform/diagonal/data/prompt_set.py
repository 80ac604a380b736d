"""The prompts that a run keeps: read once, distinct, split by hash into training and held-out, perhaps extended."""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diagonal.data.prompt_files import ROWS_AT_ONCE
from diagonal.data.prompts import SeenIds, prompt_id
from diagonal.errors import FieldError, require
from diagonal.model.text import clean_prompt
from diagonal.storage import Folder

TRAINING, HELD_OUT, MANIFEST = "train.parquet", "held_out.parquet", "manifest.json"
HELD_BYTES = 256 * 2**20
SCHEMA = pa.schema(
    [("prompt_id", pa.string()), ("prompt", pa.string()), ("original", pa.string())], metadata={"schema_version": "1"}
)


class Extends(Protocol):
    """Rewrites prompts; see `diagonal.data.extension.Extender`."""

    def extend(self, prompts: Sequence[tuple[str, str]]) -> list[str | None]:
        """For each (id, prompt) the longer prompt, or None where there is none."""
        ...

    def summary(self) -> dict[str, Any]:
        """What was asked, and how often it failed."""
        ...


def prepare(
    folder: Folder,
    source: str,
    prompts: Iterable[str],
    held_out: Callable[[str], bool],
    extender: Callable[[int], Extends] | None = None,
) -> dict[str, Any]:
    """Write `train.parquet`, `held_out.parquet` and last `manifest.json` of a stream of prompts; returns the manifest.

    `held_out` decides by a prompt's id. `extender` is called with the number of prompts. Rows keep the first order; an
    extended prompt keeps the id of its original. In memory: a thousand prompts, and 8 bytes for each distinct one.
    """
    with tempfile.TemporaryDirectory(prefix="diagonal-prompts-") as name:
        plain, final = Path(name) / "plain", Path(name) / "final"
        plain.mkdir()
        final.mkdir()
        counts = _sort_out(prompts, plain, held_out)
        require(counts["training"] > 0, "prompts", source, f"prompts of which at least one is for training ({counts})")
        extends = extender(counts["training"] + counts["held_out"]) if extender else None
        hashes = {part: _finish(plain / part, final / part, extends) for part in (TRAINING, HELD_OUT)}
        for part in hashes:
            folder.put(final / part, part)
    manifest = {
        "format_version": 1,
        "source": source,
        **counts,
        "sha256": hashes,
        "extension": extends.summary() if extends else None,
    }
    folder.write_json(MANIFEST, manifest)
    return manifest


def _sort_out(prompts: Iterable[str], target: Path, held_out: Callable[[str], bool]) -> dict[str, int]:
    counts = dict.fromkeys(("read", "empty", "duplicates", "training", "held_out"), 0)
    seen = SeenIds()
    with pq.ParquetWriter(target / TRAINING, SCHEMA) as training, pq.ParquetWriter(target / HELD_OUT, SCHEMA) as kept:
        for some in _batches(prompts, ROWS_AT_ONCE):
            found = [text for text in map(clean_prompt, some) if text]
            ids = [prompt_id(text) for text in found]
            fresh = seen.add(np.array([int(identity, 16) for identity in ids], dtype=np.uint64))
            rows = [(i, text, None) for i, text, new in zip(ids, found, fresh, strict=True) if new]
            for name, writer, wanted in (("training", training, False), ("held_out", kept, True)):
                part = [row for row in rows if held_out(row[0]) == wanted]
                counts[name] += len(part)
                if part:
                    writer.write_table(_table(part))
            counts["read"] += len(some)
            counts["empty"] += len(some) - len(found)
            counts["duplicates"] += len(found) - len(rows)
    return counts


def _finish(source: Path, target: Path, extends: Extends | None) -> str:
    """Copy the rows in groups of equal size, extended if they are to be; returns the sha256 of ids and prompts."""
    digest = hashlib.sha256()
    with pq.ParquetFile(source) as plain, pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        for some in _batches(_rows(plain), ROWS_AT_ONCE):
            longer = extends.extend([(i, text) for i, text, _ in some]) if extends else [None] * len(some)
            rows = [(i, new or text, text if new else None) for (i, text, _), new in zip(some, longer, strict=True)]
            for identity, text, _ in rows:
                digest.update(f"{identity} {text}\n".encode())
            writer.write_table(_table(rows))
    return digest.hexdigest()


def _rows(file: pq.ParquetFile) -> Iterator[tuple[str, str, str | None]]:
    for batch in file.iter_batches(ROWS_AT_ONCE):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _table(rows: Sequence[tuple[str, str, str | None]]) -> pa.Table:
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], schema=SCHEMA)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while some := list(islice(stream, size)):
        yield some


class PromptSet(Sequence[str]):
    """The prompts of one prepared file: a thousand are read at a time, and some hundred megabytes of them held.

    A remote file is copied to a temporary one by each process that reads it. Pickled, it is the file's name.
    """

    def __init__(self, folder: Folder, name: str = TRAINING) -> None:
        self._folder, self._name = folder, name
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._held_bytes = 0

    def __reduce__(self) -> tuple[type[PromptSet], tuple[Folder, str]]:
        return (type(self), (self._folder, self._name))

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [prompt for _, prompt in self.take(range(len(self))[index])]
        return self._row(range(len(self))[index])[1]

    def take(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        """(id, prompt) at each index, in the order asked for; reads each part of the file once."""
        found = {index: self._row(index) for index in sorted(set(indices))}
        return [found[index] for index in indices]

    @cached_property
    def _file(self) -> pq.ParquetFile:
        source: Any = self._folder.open(self._name) if self._folder.is_local else tempfile.TemporaryFile()
        if not self._folder.is_local:
            source.write(self._folder.read(self._name))
        file = pq.ParquetFile(source)
        version = (file.schema_arrow.metadata or {}).get(b"schema_version", b"none").decode()
        require(version == "1", f"{self._folder / self._name} schema_version", version, "1")
        return file

    def _row(self, index: int) -> tuple[str, str]:
        group, place = divmod(index, ROWS_AT_ONCE)
        if group not in self._held:
            self._held[group] = self._file.read_row_group(group, columns=["prompt_id", "prompt"])
            self._held_bytes += self._held[group].nbytes
        while self._held_bytes > HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        table = self._held[group]
        return table["prompt_id"][place].as_py(), table["prompt"][place].as_py()


def read_prompt_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of prepared prompts; `FieldError` when there is none, or of another version."""
    manifest: dict[str, Any] = folder.read_json(MANIFEST)
    if manifest.get("format_version") != 1:
        raise FieldError(f"{folder / MANIFEST} format_version", manifest.get("format_version"), "1")
    return manifest
