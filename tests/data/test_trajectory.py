"""Trajectories on storage: plain pyarrow reads them with their shapes, bit for bit, and a changed byte is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diagonal.data import trajectory
from diagonal.data.trajectory import (
    CorruptRowError,
    about_shard,
    from_bits,
    groups_of,
    open_shard,
    read_row,
    schema,
    shard_bytes,
    to_bits,
)
from diagonal.errors import FieldError
from tests.data.rows import LEVELS, SHAPE, row_of
from tests.networks import draw

ABOUT = {"teacher_id": "t", "guidance": 6.0}


def rows_of(count: int) -> list[dict[str, Any]]:
    return [row_of(sample) for sample in range(count)]


def opened(data: bytes) -> pq.ParquetFile:
    return open_shard(pa.BufferReader(data), "s.parquet")


def test_bfloat16_goes_through_its_bits_unchanged() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -3.14159, 1e-38, 3e38, torch.inf, -torch.inf, 2.0**-130])
    assert to_bits(x).dtype == np.int16
    assert torch.equal(from_bits(to_bits(x)), x.bfloat16())
    assert torch.isnan(from_bits(to_bits(torch.tensor([torch.nan])))).all()
    view = draw(4, 6).T[1:]
    assert torch.equal(from_bits(to_bits(view)), view.bfloat16())


def test_a_shard_returns_every_row_bit_for_bit() -> None:
    shard = opened(shard_bytes(rows_of(5), ABOUT))
    table = shard.read()
    for sample in (3, 0, 4):
        row = read_row(table, sample)
        assert torch.equal(row.states, draw(*SHAPE, seed=sample).bfloat16())
        assert (row.levels, row.prompt, row.seed) == (tuple(LEVELS), f"a circle {sample}", 2**62 + sample)
    assert about_shard(shard) == ABOUT


def test_equal_rows_give_equal_bytes() -> None:
    assert shard_bytes(rows_of(4), ABOUT) == shard_bytes(rows_of(4), dict(reversed(ABOUT.items())))
    assert shard_bytes(rows_of(4), ABOUT) != shard_bytes(rows_of(4), {**ABOUT, "guidance": 5.0})


def test_plain_pyarrow_reads_the_states_with_their_shape_and_what_they_came_from(tmp_path: Path) -> None:
    (tmp_path / "s.parquet").write_bytes(shard_bytes(rows_of(2), ABOUT))
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.field("states_bf16").type == pa.fixed_shape_tensor(pa.int16(), list(SHAPE))
    states = table["states_bf16"].combine_chunks().to_numpy_ndarray()
    assert states.shape == (2, *SHAPE) and np.array_equal(states[1], row_of(1)["states_bf16"])
    assert table.column_names == schema(SHAPE).names
    assert json.loads(table.schema.metadata[b"diagonal"]) == ABOUT
    assert table.schema.metadata[b"schema_version"] == b"2"


def test_a_large_row_is_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = row_of(0)["states_bf16"].nbytes
    for group_bytes, expected in ((row_bytes - 1, [1, 1, 1, 1, 1]), (2 * row_bytes, [2, 2, 1]), (2**24, [5])):
        monkeypatch.setattr(trajectory, "GROUP_BYTES", group_bytes)
        shard = opened(shard_bytes(rows_of(5), ABOUT))
        assert [shard.metadata.row_group(g).num_rows for g in range(shard.metadata.num_row_groups)] == expected
        places = list(groups_of(shard))
        assert [read_row(shard.read_row_group(g), place).seed - 2**62 for g, place in places] == [0, 1, 2, 3, 4]


def test_a_changed_state_is_seen() -> None:
    rows = rows_of(3)
    rows[1]["states_bf16"] = rows[1]["states_bf16"].copy()
    rows[1]["states_bf16"][0, 0, 0, 0, 0] ^= 1
    table = opened(shard_bytes(rows, ABOUT)).read()
    assert read_row(table, 0).seed == 2**62 and read_row(table, 2).seed == 2**62 + 2
    with pytest.raises(CorruptRowError, match="sample 1: states differ from their checksum"):
        read_row(table, 1)


@pytest.mark.parametrize("change", ["version", "missing", "column", "type", "shape"])
def test_a_shard_of_another_schema_is_refused_by_name(change: str) -> None:
    table = pq.read_table(pa.BufferReader(shard_bytes(rows_of(1), ABOUT)))
    changed = {
        "version": lambda: table.replace_schema_metadata({"schema_version": "1"}),
        "missing": lambda: table.replace_schema_metadata(None),
        "column": lambda: table.drop_columns(["seed"]),
        "type": lambda: table.set_column(0, "sample", table["sample"].cast(pa.int32())),
        "shape": lambda: table.set_column(5, "states_bf16", pa.chunked_array([[[1, 2]]], pa.list_(pa.int16()))),
    }[change]()
    sink = pa.BufferOutputStream()
    pq.write_table(changed, sink)
    with pytest.raises(FieldError, match="s.parquet (schema_version = .*allowed is 2|columns = )"):
        opened(sink.getvalue().to_pybytes())
