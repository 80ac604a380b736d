"""Trajectories on storage: plain pyarrow reads them with their shapes, bit for bit, and a changed byte is seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diagonal.data.trajectory import (
    CorruptRowError,
    checksum,
    from_bits,
    read_row,
    read_shard,
    schema,
    to_bits,
    write_shard,
)
from diagonal.errors import FieldError
from tests.networks import draw

SHAPE = (6, 4, 3, 2, 2)
LEVELS = [1.0, 0.9375, 0.5 / 1.4, 0.0]


def rows_of(count: int) -> list[dict[str, Any]]:
    rows = []
    for sample in range(count):
        bits = to_bits(draw(*SHAPE, seed=sample))
        rows.append({
            "sample": sample, "prompt_id": f"id{sample}", "prompt": f"a circle {sample}", "seed": 2**62 + sample,
            "levels": LEVELS, "states_bf16": bits, "checksum": checksum(bits), "teacher_id": "t",
        })
    return rows


def test_bfloat16_goes_through_its_bits_unchanged() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -3.14159, 1e-38, 3e38, torch.inf, -torch.inf, 2.0**-130])
    assert to_bits(x).dtype == np.int16
    assert torch.equal(from_bits(to_bits(x)), x.bfloat16())
    assert torch.isnan(from_bits(to_bits(torch.tensor([torch.nan])))).all()
    view = draw(4, 6).T[1:]
    assert torch.equal(from_bits(to_bits(view)), view.bfloat16())


def test_a_shard_returns_every_row_bit_for_bit(tmp_path: Path) -> None:
    write_shard(tmp_path / "deep" / "s.parquet", rows_of(5))
    table = read_shard(tmp_path / "deep" / "s.parquet")
    for sample in (3, 0, 4):
        row = read_row(table, sample)
        assert torch.equal(row.states, draw(*SHAPE, seed=sample).bfloat16())
        assert (row.levels, row.prompt, row.seed) == (tuple(LEVELS), f"a circle {sample}", 2**62 + sample)


def test_plain_pyarrow_reads_the_states_with_their_shape(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.parquet", rows_of(2))
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.field("states_bf16").type == pa.fixed_shape_tensor(pa.int16(), list(SHAPE))
    states = table["states_bf16"].combine_chunks().to_numpy_ndarray()
    assert states.shape == (2, *SHAPE) and np.array_equal(states[1], rows_of(2)[1]["states_bf16"])
    assert table.column_names == schema(SHAPE).names


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    rows = rows_of(3)
    rows[1]["states_bf16"] = rows[1]["states_bf16"].copy()
    rows[1]["states_bf16"][0, 0, 0, 0, 0] ^= 1
    write_shard(tmp_path / "s.parquet", rows)
    table = read_shard(tmp_path / "s.parquet")
    assert read_row(table, 0).seed == 2**62 and read_row(table, 2).seed == 2**62 + 2
    with pytest.raises(CorruptRowError, match="sample 1: states differ from their checksum"):
        read_row(table, 1)


@pytest.mark.parametrize("metadata", [None, {"schema_version": "0"}, {"schema_version": "2"}])
def test_a_shard_of_another_version_is_refused_by_name(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    write_shard(tmp_path / "s.parquet", rows_of(1))
    table = pq.read_table(tmp_path / "s.parquet").replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "s.parquet")
    with pytest.raises(FieldError, match="s.parquet schema_version = .*allowed is 1"):
        read_shard(tmp_path / "s.parquet")


def test_a_shard_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "s.parquet", rows_of(1))
    before = (tmp_path / "s.parquet").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_shard(tmp_path / "s.parquet", rows_of(2))
    assert (tmp_path / "s.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["s.parquet"]
