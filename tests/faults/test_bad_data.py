"""Rows of a finished set of pairs that rot on the disk: set aside by name and reason, or too many to go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.conftest import launching
from tests.faults.job import Job, Launcher
from tests.faults.nodes import Nodes

ROWS, IN_SHARD, UPDATES = 16, 4, 4
PAIRS = {
    "pairs.count": ROWS,
    "pairs.rows_per_shard": IN_SHARD,
    "pairs.batch_size": 4,
    "pairs.max_bad_share": 0.6,
    "ode_init.updates": UPDATES,
    "ode_init.batch_size": 4,
    "ode_init.micro_batch_size": 2,
    "ode_init.checkpoint_every": 2,
    "train.workers": 1,
}


@pytest.fixture(scope="module")
def pairs(cluster: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a run that has made its pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    with launching(cluster, folder) as start:
        job = start(job="pairs", settings=PAIRS)
        assert job.ended() == 0, job.tail()
        return folder / "runs"


def initialise(start: Launcher, storage: Path) -> Job:
    return start("--resume", job="ode_init", storage=str(storage), settings=PAIRS)


def flip_a_page(shard: Path) -> None:
    """One bit in the middle of a shard: inside the states, whose pages make up nearly all of it."""
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def change_a_row(shard: Path) -> None:
    """A shard that reads well, but the second of its rows is not what was written."""
    table = pq.read_table(shard)
    place, digests = table.column_names.index("checksum"), table["checksum"].to_pylist()
    digests[1] = digests[0]
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(digests, pa.string())), shard)


def drop_a_column(shard: Path) -> None:
    """The schema of another version."""
    table = pq.read_table(shard)
    pq.write_table(table.drop_columns(["seed"]) if "seed" in table.column_names else pa.table({"x": [1]}), shard)


def test_corrupt_rows_are_set_aside_by_name_and_reason_and_never_trained_on(
    nodes: list[Any], start: Launcher, pairs: Path, tmp_path: Path
) -> None:
    """T7."""
    storage = tmp_path / "copy"
    shutil.copytree(pairs, storage)
    flip_a_page(storage / "r" / "pairs" / "pairs-000001.parquet")
    change_a_row(storage / "r" / "pairs" / "pairs-000002.parquet")
    drop_a_column(storage / "r" / "pairs" / "pairs-000003.parquet")
    job = initialise(start, storage)
    assert job.ended() == 0, job.tail()
    aside = (job.folder / "pairs").read_json("usable.json")["quarantined"]
    found = {row["sample"]: row["reason"] for row in aside}
    unreadable, drifted = dict.fromkeys(range(4, 8), "unreadable"), dict.fromkeys(range(12, 16), "schema")
    assert found == {**unreadable, 9: "checksum", **drifted}
    for row in aside:
        assert f"{row['file']}, row {row['index']} (sample {row['sample']}) quarantined: {row['reason']}" in job.text
    assert len(job.record("ode_init").updates) == UPDATES


def test_more_corrupt_rows_than_allowed_end_the_job_and_name_the_first(
    start: Launcher, pairs: Path, tmp_path: Path
) -> None:
    """T7, above the share."""
    storage = tmp_path / "copy"
    shutil.copytree(pairs, storage)
    for shard in (1, 2, 3):
        drop_a_column(storage / "r" / "pairs" / f"pairs-00000{shard}.parquet")
    job = initialise(start, storage)
    assert job.ended() == 2
    said = job.error
    assert said.startswith("error: share of rows quarantined = 0.75: allowed is at most pairs.max_bad_share = 0.6"), (
        said
    )
    assert "sample 4, prompt " in said and ": schema" in said
    assert not job.folder.has("ode_init/lineage.json")
