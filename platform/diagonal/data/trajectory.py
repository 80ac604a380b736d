"""Trajectories on storage: Arrow rows that plain pyarrow reads with their shapes, and the shards that hold them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from diagonal.diffusion.teacher import Trajectory
from diagonal.errors import require

SCHEMA_VERSION = 1


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


def schema(state_shape: Sequence[int]) -> pa.Schema:
    """Columns of a shard; `states_bf16` is an Arrow fixed-shape tensor of int16 bits `[s, c, f, h, w]`."""
    return pa.schema(
        [
            ("sample", pa.int64()), ("prompt_id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64()),
            ("levels", pa.list_(pa.float64())), ("states_bf16", pa.fixed_shape_tensor(pa.int16(), list(state_shape))),
            ("checksum", pa.string()), ("teacher_id", pa.string()),
        ],
        metadata={"schema_version": str(SCHEMA_VERSION)},
    )


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (columns of `schema`) as one Parquet file, whole or not at all."""
    shape = rows[0]["states_bf16"].shape
    layout = schema(shape)
    states = np.stack([row["states_bf16"] for row in rows])
    columns = [
        pa.FixedShapeTensorArray.from_numpy_ndarray(states) if field.name == "states_bf16"
        else pa.array([row[field.name] for row in rows], type=field.type)
        for field in layout
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.Table.from_arrays(columns, schema=layout), temporary)
    os.replace(temporary, path)


def read_shard(path: Path) -> pa.Table:
    """The table of a shard; `FieldError` when its schema is of another version."""
    table = pq.read_table(path)
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    require(version == str(SCHEMA_VERSION), f"{path.name} schema_version", version, str(SCHEMA_VERSION))
    return table


def read_row(table: pa.Table, index: int) -> Trajectory:
    """One trajectory of a shard; `CorruptRowError` when its states do not match their checksum."""
    row_alone = table.slice(index, 1)  # before combining: that copies
    bits = row_alone["states_bf16"].combine_chunks().to_numpy_ndarray()[0]
    row = {name: table[name][index].as_py() for name in ("sample", "prompt", "seed", "levels", "checksum")}
    if checksum(bits) != row["checksum"]:
        raise CorruptRowError(f"sample {row['sample']}: states differ from their checksum")
    return Trajectory(from_bits(bits), tuple(row["levels"]), row["prompt"], row["seed"])
