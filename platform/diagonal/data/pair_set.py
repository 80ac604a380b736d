"""A folder of pairs: what decides it, which shards are finished, its manifest, and which of its rows are trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from diagonal.config import Config
from diagonal.data.trajectory import SCHEMA_VERSION, CorruptRowError, about_shard, open_shard, read_row
from diagonal.errors import FieldError, require
from diagonal.storage import Folder

PLAN, MANIFEST, USABLE, QUARANTINE = "plan.json", "manifest.json", "usable.json", "quarantined"
FORMAT_VERSION = 2
READERS, VERIFIERS = 16, 4
SHOWN = 5
NOT_FINITE, UNREADABLE, SCHEMA, CHECKSUM = "not_finite", "unreadable", "schema", "checksum"

Row = dict[str, Any]


@dataclass(frozen=True)
class PairPlan:
    """What decides every bit of a set of pairs, and how its samples lie in shards."""

    config: Config
    prompts: int
    prompts_sha256: str
    teacher_id: str

    @property
    def facts(self) -> Row:
        """All that decides the set, as plain JSON values."""
        pairs, model = self.config.pairs, self.config.model
        facts = {
            "schema_version": SCHEMA_VERSION,
            "seed": self.config.seed,
            "count": pairs.count,
            "rows_per_shard": pairs.rows_per_shard,
            "batch_size": pairs.batch_size,
            "prompts": self.prompts,
            "prompts_sha256": self.prompts_sha256,
            "text_tokens": model.text_tokens,
            "negative_prompt": model.negative_prompt,
            "compute_dtype": model.compute_dtype,
            **self._about,
        }
        plain: Row = json.loads(json.dumps(facts))
        return plain

    @property
    def set_id(self) -> str:
        """16 hexadecimal digits of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def about(self) -> Row:
        """What all rows have in common: goes into the metadata of each shard."""
        return {**self._about, "set_id": self.set_id, "states": "bfloat16, as the int16 of its bits: [s, c, f, h, w]"}

    @property
    def _about(self) -> Row:
        pairs = self.config.pairs
        return {
            "geometry": dataclasses.asdict(self.config.geometry),
            "guidance": pairs.guidance,
            "solver": "euler",
            "solver_steps": pairs.solver_steps,
            "shift": self.config.schedule.shift,
            "kept_raw": pairs.kept_raw,
            "teacher_id": self.teacher_id,
        }

    @property
    def shards(self) -> range:
        return range(-(-self.config.pairs.count // self.config.pairs.rows_per_shard))

    def samples(self, shard: int) -> range:
        """The samples of a shard."""
        size = self.config.pairs.rows_per_shard
        return range(shard * size, min((shard + 1) * size, self.config.pairs.count))

    @property
    def most_bad(self) -> int:
        """How many rows may be bad."""
        return math.floor(self.config.pairs.max_bad_share * self.config.pairs.count + 1e-9)

    def check_bad(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """`FieldError` that names the first bad rows, when there are too many."""
        first = [f"sample {row['sample']}, prompt {row['prompt_id']}: {row['reason']}" for row in rows[:SHOWN]]
        allowed = f"at most pairs.max_bad_share = {self.config.pairs.max_bad_share}; {'; '.join(first)}"
        require(
            len(rows) <= self.most_bad,
            "share of rows quarantined",
            round(len(rows) / self.config.pairs.count, 4),
            allowed,
        )


@dataclass(frozen=True)
class Shard:
    """One finished shard: rows written, their `checksum` (of samples and states), and the rows quarantined."""

    number: int
    rows: int
    bytes: int
    checksum: str
    quarantined: tuple[Row, ...] = ()

    @property
    def file(self) -> str:
        return shard_file(self.number)


def shard_file(shard: int) -> str:
    """Name of a shard's file."""
    return f"pairs-{shard:06d}.parquet"


def aside_file(shard: int) -> str:
    """Name of the list of a shard's rows that were set aside."""
    return f"{QUARANTINE}/pairs-{shard:06d}.json"


def begin(folder: Folder, plan: PairPlan) -> None:
    """Write `plan.json`, or check that the folder was begun with the same, and remove what unfinished writes left."""
    if folder.has(PLAN):
        found = folder.read_json(PLAN)
        for name, value in plan.facts.items():
            allowed = f"{found.get(name)!r}, as the pairs in {folder} were begun with; or another --name"
            require(found.get(name) == value, f"pairs: {name}", value, allowed)
    else:
        folder.write_json(PLAN, plan.facts)
    for left in folder.path.rglob(".*.tmp") if folder.is_local else ():
        left.unlink(missing_ok=True)


def finished(folder: Folder, plan: PairPlan) -> dict[int, Shard]:
    """The shards that are whole, by number; files of others are removed. `FieldError` for shards of another set."""
    sizes = folder.files()
    found = [s for s in plan.shards if shard_file(s) in sizes or aside_file(s) in sizes]
    with ThreadPoolExecutor(READERS) as pool:
        shards = list(pool.map(lambda shard: examine(folder, plan, shard, sizes), found))
    return {shard.number: shard for shard in shards if shard is not None}


def examine(folder: Folder, plan: PairPlan, shard: int, sizes: Mapping[str, int]) -> Shard | None:
    """A shard as its footer and its list of rows quarantined have it; None, and both removed, when it is not whole."""
    try:
        aside = json.loads(folder.read(aside_file(shard))) if aside_file(shard) in sizes else []
        rows, digest = 0, ""
        if shard_file(shard) in sizes:
            rows, digest = _read_ends(folder, plan, shard)
        if rows + len(aside) == len(plan.samples(shard)):
            return Shard(shard, rows, sizes.get(shard_file(shard), 0), digest, tuple(aside))
    except (pa.ArrowException, OSError, json.JSONDecodeError, UnicodeDecodeError):
        pass  # cut off, or changed on the disk: solved again
    folder.remove(shard_file(shard))
    folder.remove(aside_file(shard))
    return None


def _read_ends(folder: Folder, plan: PairPlan, shard: int) -> tuple[int, str]:
    with folder.open(shard_file(shard)) as file:
        parquet = open_shard(file, shard_file(shard))
        found = about_shard(parquet).get("set_id")
        require(
            found == plan.set_id,
            f"{folder / shard_file(shard)} set_id",
            found,
            f"{plan.set_id}: it is of another set; or another --name",
        )
        table = parquet.read(columns=["sample", "checksum"])
    return table.num_rows, rows_checksum(zip(table["sample"].to_pylist(), table["checksum"].to_pylist(), strict=True))


def rows_checksum(rows: Iterable[tuple[int, str]]) -> str:
    """sha256 over (sample, checksum of its states) of rows, in hexadecimal."""
    return hashlib.sha256("".join(f"{sample} {digest}\n" for sample, digest in rows).encode()).hexdigest()


def finish(folder: Folder, plan: PairPlan, shards: Sequence[Shard]) -> Row:
    """Check the share of bad rows and write the manifest, which makes the set finished."""
    aside = [row for shard in shards for row in shard.quarantined]
    plan.check_bad(aside)
    entries = [
        {"file": s.file, "shard": s.number, "rows": s.rows, "bytes": s.bytes, "checksum": s.checksum}
        for s in shards
        if s.rows
    ]
    manifest = {
        "format_version": FORMAT_VERSION,
        "set_id": plan.set_id,
        "plan": plan.facts,
        "rows": sum(s.rows for s in shards),
        "quarantined": aside,
        "shards": entries,
        "checksum": hashlib.sha256(" ".join(s.checksum for s in shards).encode()).hexdigest(),
    }
    folder.write_json(MANIFEST, manifest)
    return manifest


def read_manifest(folder: Folder) -> Row:
    """The manifest of a finished set; `FieldError` when there is none, or of another version."""
    manifest: Row = folder.read_json(MANIFEST)
    version = manifest.get("format_version")
    require(version == FORMAT_VERSION, f"{folder / MANIFEST} format_version", version, str(FORMAT_VERSION))
    return manifest


def verify(folder: Folder) -> list[Row]:
    """The rows of a finished set that cannot be trained on, by sample; reads all of it, a few shards at once."""
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(VERIFIERS) as pool:
        found = pool.map(lambda entry: bad_rows(folder, manifest, entry), manifest["shards"])
        return sorted((row for rows in found for row in rows), key=lambda row: row["sample"])


def bad_rows(folder: Folder, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> list[Row]:
    """Read a whole shard and name the rows that cannot be trained on: file, index, sample, prompt_id, reason."""
    gone = {row["sample"] for row in manifest["quarantined"]}
    size, count = manifest["plan"]["rows_per_shard"], manifest["plan"]["count"]
    first = entry["shard"] * size
    samples = [sample for sample in range(first, min(first + size, count)) if sample not in gone]

    def row(index: int, reason: str, identity: str | None = None) -> Row:
        return {
            "file": entry["file"],
            "index": index,
            "sample": samples[index],
            "prompt_id": identity,
            "reason": reason,
        }

    reasons = _reasons(folder, entry, manifest["set_id"])
    return [row(index, *reasons[index]) for index in range(entry["rows"]) if reasons[index]]


def _reasons(folder: Folder, entry: Mapping[str, Any], set_id: str) -> list[tuple[str, ...]]:
    """For each row why it is bad and its prompt's id where that is known; empty where it is good."""
    try:
        shard = open_shard(pa.BufferReader(folder.read(entry["file"])), entry["file"])
        require(about_shard(shard).get("set_id") == set_id, "set_id", about_shard(shard), set_id)
        require(shard.metadata.num_rows == entry["rows"], "rows", shard.metadata.num_rows, str(entry["rows"]))
    except FieldError:
        missing = not folder.has(entry["file"])
        return [(UNREADABLE if missing else SCHEMA,)] * entry["rows"]
    except (pa.ArrowException, OSError, ValueError):
        return [(UNREADABLE,)] * entry["rows"]
    found: list[tuple[str, ...]] = []
    for group in range(shard.metadata.num_row_groups):
        try:
            table = shard.read_row_group(group)
        except (pa.ArrowException, OSError, ValueError):
            found += [(UNREADABLE,)] * shard.metadata.row_group(group).num_rows
            continue
        found += [_reason(table, place) for place in range(table.num_rows)]
    return found


def _reason(table: pa.Table, place: int) -> tuple[str, ...]:
    try:
        read_row(table, place)
    except CorruptRowError:
        return CHECKSUM, table["prompt_id"][place].as_py()
    return ()


def keep_usable(folder: Folder, plan: PairPlan, bad: Sequence[Row]) -> None:
    """Check the share of bad rows, those of the solving included, and write what training leaves out, once."""
    manifest = read_manifest(folder)
    plan.check_bad([*bad, *manifest["quarantined"]])
    folder.write_json(
        USABLE,
        {
            "format_version": 1,
            "set_id": plan.set_id,
            "rows": manifest["rows"] - len(bad),
            "quarantined": sorted(bad, key=lambda row: row["sample"]),
        },
    )


def usable_places(folder: Folder) -> list[tuple[str, int]]:
    """(file, index in it) of every row that training reads, in one order for all ranks and for every resume."""
    manifest, usable = read_manifest(folder), folder.read_json(USABLE)
    require(usable["set_id"] == manifest["set_id"], f"{folder / USABLE} set_id", usable["set_id"], manifest["set_id"])
    gone = {(row["file"], row["index"]) for row in usable["quarantined"]}
    every = ((entry["file"], index) for entry in manifest["shards"] for index in range(entry["rows"]))
    return [place for place in every if place not in gone]
