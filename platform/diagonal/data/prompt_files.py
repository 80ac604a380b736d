"""Prompt files as they lie about: text, tables and JSON, plain or gzipped, read a piece at a time."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diagonal.errors import FieldError, require
from diagonal.storage import Folder
from diagonal.storage.remote import location

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
FIELDS = ("prompt", "caption", "text", "prompts", "captions", "Prompt", "Caption", "Text")  # in order of preference
PIECE_BYTES = 2**20
ROWS_AT_ONCE = 1024
SHOWN = 3
_FIRST_ROWS = 1000  # before these a share says little
_WHOLE_BYTES = 2**30  # of a .json file, which is read at once
_CODES = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_NO_TEXT = (
    (b"version https://git-lfs", "a Git LFS pointer: `git lfs pull` brings the file itself"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzipped: its name ends in .gz"),
    (b"PAR1", "Parquet: its name ends in .parquet"),
    (b"<!doctype html", "a page of HTML"),
    (b"<html", "a page of HTML"),
)


@dataclass
class SetAside:
    """Rows that hold no prompt, by place and reason: up to a share of those read they are left out."""

    most_share: float = 0.0
    read: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: FieldError) -> None:
        """Leave a row out; raises its error where none may be."""
        if self.most_share == 0.0:
            raise error
        self.count += 1
        self.first += [str(error)] if len(self.first) < SHOWN else []
        if self.read >= _FIRST_ROWS:
            self.check()

    def check(self) -> None:
        """`FieldError` when more rows were left out than may be."""
        allowed = (
            f"at most {self.most_share:g} of the rows, prompts.max_bad_share; the first are: {'; '.join(self.first)}"
        )
        require(self.count <= self.most_share * self.read, "rows without a prompt", self.count, allowed)


def read_prompts(uri: str, patience_s: float = 120.0, named: str = "", aside: SetAside | None = None) -> Iterator[str]:
    """Prompts as they stand in a file, or in a folder's files by name, in memory for a piece of it.

    A path, an s3:// or hf:// URI, or a data set's org/name on the hub. `.txt` holds one a line (or is a table: a header
    and tabs); `.csv`, `.tsv`, `.jsonl`, `.json` and `.parquet` have a field `named`, by default the first of `FIELDS`
    that is there; all but Parquet may be gzipped, and UTF-8 or UTF-16. `FieldError` names the file, or the line or row
    of it, that is not so; rows go to `aside` while it takes them.
    """
    aside = aside or SetAside()
    whole = Folder(location(uri, "datasets"), patience_s)
    folder, names = (whole.parent, [whole.name]) if uri and _is_file(whole) else (whole, _inside(whole, uri))
    for name in names:
        place = uri if folder != whole else f"{uri.rstrip('/')}/{name}"
        require(_suffix(name) in SUFFIXES, "prompts", uri, f"a file ending in one of {SUFFIXES}, or these with .gz")
        with folder.open(name) as file:
            for row in _rows(file, name, place, named, aside):
                aside.read += 1
                if isinstance(row, FieldError):
                    aside.add(row)
                else:
                    yield row
    aside.check()


Row = str | FieldError


def _is_file(whole: Folder) -> bool:
    try:
        return whole.parent.has(whole.name)
    except FieldError:  # a bucket, or a repository of the hub: nothing is above it
        return False


def _suffix(name: str) -> str:
    plain = name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), "")


def _inside(folder: Folder, uri: str) -> list[str]:
    found = [name for name in folder.children() if _suffix(name) and not name.startswith(".")] if uri else []
    allowed = f"a file that exists, or a folder of files, ending in one of {SUFFIXES}, or these with .gz"
    require(bool(found), "prompts", uri, allowed)
    return found


def _rows(file: pa.NativeFile, name: str, place: str, named: str, aside: SetAside) -> Iterator[Row]:
    suffix, packed = _suffix(name), name.lower().endswith(".gz")
    if suffix == ".parquet":
        return _parquet_rows(file, place, named)
    pieces = _pieces(pa.CompressedInputStream(file, "gzip") if packed else file, place)
    first = next(pieces, b"")
    _refuse_other_kinds(first, place, suffix)
    whole = _again(first, pieces)
    if suffix == ".json":
        return _json_rows(whole, place, named)
    lines = _lines(whole, place)
    if suffix == ".jsonl":
        return (
            _jsonl_row(line, f"{place}, line {number}", named) for number, line in enumerate(lines, 1) if line.strip()
        )
    head = first.split(b"\n", 1)[0].decode("utf-8", "replace").strip().split("\t")
    is_table = suffix in (".csv", ".tsv") or (len(head) > 1 and _chosen(head, named) is not None)
    if is_table:
        return _table_rows(lines, place, named, "," if suffix == ".csv" else "\t")
    return (_text(line, f"{place}, line {number}") for number, line in enumerate(lines, 1))


def _pieces(file: pa.NativeFile, place: str) -> Iterator[bytes]:
    """A file's text in UTF-8, whatever its byte order mark says it is in."""
    decoder: codecs.IncrementalDecoder | None = None
    first = True
    while piece := _read(file, place):
        if first:
            mark, code = next(((mark, code) for mark, code in _CODES if piece.startswith(mark)), (b"", "utf-8"))
            piece, first = piece[len(mark) :], False
            decoder = codecs.getincrementaldecoder(code)("replace") if code != "utf-8" else None
        yield piece if decoder is None else decoder.decode(piece).encode()


def _read(file: pa.NativeFile, place: str) -> bytes:
    try:
        return bytes(file.read(PIECE_BYTES))
    except (pa.ArrowException, OSError) as error:
        raise FieldError("prompts", place, f"a file that can be read ({error})") from error


def _again(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _refuse_other_kinds(first: bytes, place: str, suffix: str) -> None:
    """`FieldError` for what is no list of prompts, whatever it is called."""
    start = first[:4096].lstrip()
    kind = next((kind for mark, kind in _NO_TEXT if start.lower().startswith(mark.lower())), "")
    if not kind and b"\0" in start:
        kind = "no text"
    line = start.strip()
    if (
        not kind
        and b"\n" not in line
        and not any(c in line for c in b" \t")
        and _is_path(line.decode("utf-8", "replace"))
    ):
        kind = "the text of a link to another file"
    if not kind and suffix == ".txt" and _is_json(first):
        kind = "JSON: its name ends in .json or .jsonl"
    require(not kind, "prompts", place, f"a list of prompts; this is {kind}")


def _is_path(line: str) -> bool:
    return "/" in line and (line.startswith(("/", "./", "../")) or bool(_suffix(line)))


def _is_json(first: bytes) -> bool:
    lines = first.strip().split(b"\n", 1)
    if lines[0].strip() in (b"{", b"["):
        return True
    try:
        return isinstance(json.loads(lines[0]), (dict, list))
    except ValueError:
        return False


def _lines(pieces: Iterator[bytes], place: str) -> Iterator[bytes]:
    """Lines that end at a line feed alone: a JSON text may hold other separators."""
    rest, number = b"", 0
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        number += len(whole)
        yield from whole
        require(len(rest) <= PIECE_BYTES, f"{place}, line {number + 1}", rest[:80], f"at most {PIECE_BYTES} bytes")
    if rest:
        yield rest


def _jsonl_row(line: bytes, where: str, named: str) -> Row:
    try:
        return _of_value(json.loads(line), where, named)
    except ValueError:
        return FieldError(where, line[:80].decode("utf-8", "replace"), "a JSON object with a prompt")


def _json_rows(pieces: Iterator[bytes], place: str, named: str) -> Iterator[Row]:
    data = bytearray()
    for piece in pieces:
        data += piece
        require(
            len(data) <= _WHOLE_BYTES, "prompts", place, f"at most {_WHOLE_BYTES} bytes of JSON; .jsonl may be longer"
        )
    try:
        value = json.loads(bytes(data))
    except ValueError as error:
        raise FieldError("prompts", place, f"JSON ({error})") from error
    if isinstance(value, dict):
        key = _chosen(list(value), named) or next((key for key, items in value.items() if isinstance(items, list)), "")
        value = value.get(key)
    if not isinstance(value, list):
        raise FieldError("prompts", place, f"a list of prompts, or an object with one ({' or '.join(FIELDS[:4])})")
    for number, item in enumerate(value):
        yield _of_value(item, f"{place}, entry {number}", named)


def _of_value(value: Any, where: str, named: str) -> Row:
    """The prompt of an entry: the text itself, or the field of an object that holds it."""
    if not isinstance(value, Mapping):
        return _text(value, where)
    key = _chosen(list(value), named)
    if key is None:
        return FieldError(where, list(value)[:12], f"a field {named or ' or '.join(FIELDS[:3])} (prompts.field)")
    return _text(value[key], where)


def _table_rows(lines: Iterator[bytes], place: str, named: str, separator: str) -> Iterator[Row]:
    texts = (line.decode("utf-8", "replace") + "\n" for line in lines)
    reader = csv.reader(texts, delimiter=separator, quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE)
    try:
        header = next(reader, [])
        column = _column(header, place, named)
        for row in reader:
            where = f"{place}, line {reader.line_num}"
            if row:
                short = FieldError(where, row[:12], f"{len(header)} fields, as the header has")
                yield _text(row[column], where) if len(row) > column else short
    except csv.Error as error:
        raise FieldError(f"{place}, line {reader.line_num}", str(error), "a table that can be read") from error


def _parquet_rows(file: pa.NativeFile, place: str, named: str) -> Iterator[Row]:
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        column = names[_column(names, place, named)]
        row = 0
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _text(value, f"{place}, row {row}")
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise FieldError("prompts", place, f"a Parquet file that can be read ({error})") from error


def _column(names: list[str], place: str, named: str) -> int:
    chosen = _chosen([name.strip() for name in names], named)
    if chosen is None:
        allowed = f"a table with a column {named or ' or '.join(FIELDS[:3])}; there are {names[:12]} (prompts.field)"
        raise FieldError("prompts", place, allowed)
    return [name.strip() for name in names].index(chosen)


def _chosen(names: list[str], named: str) -> str | None:
    return next((name for name in ((named,) if named else FIELDS) if name in names), None)


def _text(value: Any, where: str) -> Row:
    if isinstance(value, bytes):
        try:
            return value.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            return FieldError(where, value[:80], f"a text in UTF-8 ({error})")
    if not isinstance(value, str):
        return FieldError(where, value, "a prompt that is a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half a character
        return FieldError(where, value[:80], f"a text in Unicode ({error})")
    return value
