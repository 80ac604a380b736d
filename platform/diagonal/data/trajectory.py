"""Trajectories on storage: Arrow rows that plain pyarrow reads with their shapes, and the shards that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from diagonal.diffusion.teacher import Trajectory
from diagonal.errors import FieldError, require

SCHEMA_VERSION = 2
GROUP_BYTES = 2**20  # of states in one row group, which is the least that a reader reads
VERSION_KEY, ABOUT_KEY = b"schema_version", b"diagonal"


class CorruptRowError(RuntimeError):
    """A row whose bytes do not match its checksum."""


def to_bits(x: Tensor) -> np.ndarray:
    """bfloat16 of `x` as int16 bits: Arrow and numpy know no bfloat16."""
    return x.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()


def from_bits(bits: np.ndarray) -> Tensor:
    """The bfloat16 tensor whose bits these are."""
    return torch.from_numpy(np.array(bits, dtype=np.int16)).view(torch.bfloat16)


def checksum(bits: np.ndarray) -> str:
    """sha256 of the states' bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(bits).tobytes()).hexdigest()


def schema(state_shape: Sequence[int], about: Mapping[str, Any] | None = None) -> pa.Schema:
    """Columns of a shard; `states_bf16` is an Arrow fixed-shape tensor of int16 bits `[s, c, f, h, w]`.

    The metadata holds `schema_version`, and as JSON under `diagonal` what all rows have in common (see
    `diagonal.data.pair_set.PairPlan.about`).
    """
    return pa.schema(
        [
            ("sample", pa.int64()),
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("seed", pa.int64()),
            ("levels", pa.list_(pa.float64())),
            ("states_bf16", pa.fixed_shape_tensor(pa.int16(), list(state_shape))),
            ("checksum", pa.string()),
        ],
        metadata={VERSION_KEY: str(SCHEMA_VERSION), ABOUT_KEY: json.dumps(about or {}, sort_keys=True)},
    )


def shard_bytes(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> bytes:
    """Rows (columns of `schema`) as one Parquet file: the same bytes for the same rows; pages carry checksums."""
    states = np.stack([row["states_bf16"] for row in rows])
    layout = schema(states.shape[1:], about)
    columns = [
        pa.FixedShapeTensorArray.from_numpy_ndarray(states)
        if field.name == "states_bf16"
        else pa.array([row[field.name] for row in rows], type=field.type)
        for field in layout
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=layout),
        sink,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=max(1, GROUP_BYTES // states[0].nbytes),
    )
    return sink.getvalue().to_pybytes()


def open_shard(file: pa.NativeFile, name: str) -> pq.ParquetFile:
    """A shard of this version, opened; `FieldError` for another version, `pa.ArrowException` or `OSError` for a file
    that is broken."""
    shard = pq.ParquetFile(file, page_checksum_verification=True)
    found = shard.schema_arrow
    version = (found.metadata or {}).get(VERSION_KEY, b"none").decode()
    require(version == str(SCHEMA_VERSION), f"{name} schema_version", version, str(SCHEMA_VERSION))
    states = found.field("states_bf16").type if "states_bf16" in found.names else None
    shape = states.shape if isinstance(states, pa.FixedShapeTensorType) else ()
    if not shape or not found.equals(schema(shape)):
        raise FieldError(f"{name} columns", found.names, f"those of schema version {SCHEMA_VERSION}")
    return shard


def about_shard(shard: pq.ParquetFile) -> dict[str, Any]:
    """What all rows of a shard have in common, as its metadata has it."""
    about: dict[str, Any] = json.loads(shard.schema_arrow.metadata[ABOUT_KEY])
    return about


def groups_of(shard: pq.ParquetFile) -> Iterator[tuple[int, int]]:
    """(row group, place in it) of each row of a shard, in order."""
    for group in range(shard.metadata.num_row_groups):
        yield from ((group, place) for place in range(shard.metadata.row_group(group).num_rows))


def read_row(table: pa.Table, index: int) -> Trajectory:
    """One trajectory of a table; `CorruptRowError` when its states do not match their checksum."""
    row_alone = table.slice(index, 1)  # before combining: that copies
    bits = row_alone["states_bf16"].combine_chunks().to_numpy_ndarray()[0]
    row = {name: table[name][index].as_py() for name in ("sample", "prompt", "seed", "levels", "checksum")}
    if checksum(bits) != row["checksum"]:
        raise CorruptRowError(f"sample {row['sample']}: states differ from their checksum")
    return Trajectory(from_bits(bits), tuple(row["levels"]), row["prompt"], row["seed"])
