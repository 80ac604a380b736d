"""The pairs job: shards that a killed run finds again, the same set however often it was cut off."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from diagonal.data.trajectory import read_row, read_shard
from diagonal.diffusion.noise import clip_noise
from diagonal.errors import FieldError
from jobs.pairs import make_pairs, plan_rows, prompts_of
from tests.jobs.conftest import OpenRun

pytestmark = pytest.mark.usefixtures("ray_cluster")


def checksums(folder: Path) -> dict[int, str]:
    tables = [pq.read_table(file) for file in sorted(folder.glob("pairs-*.parquet"))]
    return {s: c for t in tables for s, c in zip(t["sample"].to_pylist(), t["checksum"].to_pylist(), strict=True)}


def test_a_run_that_lost_shards_solves_those_alone_and_ends_with_the_same_set(small_run: OpenRun) -> None:
    run = small_run("a")
    folder = make_pairs(run)
    whole, kept = checksums(folder), folder / "pairs-000000.parquet"
    assert sorted(whole) == [0, 1, 2, 3, 4]
    (folder / "manifest.json").unlink()
    (folder / "pairs-000001.parquet").unlink()
    written_ns = kept.stat().st_mtime_ns
    make_pairs(run)
    assert checksums(folder) == whole
    assert kept.stat().st_mtime_ns == written_ns


def test_rows_hold_the_noise_of_their_seed_first_and_a_clean_end(small_run: OpenRun) -> None:
    run = small_run("a")
    folder = make_pairs(run)
    table, row = read_shard(folder / "pairs-000000.parquet"), plan_rows(run, prompts_of(run))[0]
    found = read_row(table, 0)
    geometry = run.config.geometry
    noise = clip_noise(row["seed"], geometry.clip_chunks, geometry.chunk_shape()[1:])
    assert (found.prompt, found.seed) == (row["prompt"], row["seed"])
    assert torch.equal(found.states[0], noise.to(torch.bfloat16))
    assert (found.levels[0], found.levels[-1]) == (1.0, 0.0)
    assert table["states_bf16"].type.shape == list(found.states.shape)


def test_too_many_rows_set_aside_fail_the_run(small_run: OpenRun) -> None:
    run = small_run("a")
    folder = make_pairs(run)
    (folder / "manifest.json").unlink()
    (folder / "pairs-000001.parquet").rename(folder / "gone")
    (folder / "set_aside").mkdir()
    (folder / "set_aside" / "pairs-000001.json").write_text("[]")
    with pytest.raises(FieldError, match=r"share of rows set aside = 0\.4: allowed is at most pairs.max_bad_share"):
        make_pairs(run)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_set_of_an_unbroken_one(
    small_run: OpenRun, repository: Path
) -> None:
    unbroken, broken = small_run("unbroken"), small_run("broken")
    command = [sys.executable, "-m", "jobs.pairs", "--name=broken", "--resume", "--config",
               str(broken.folder.path / "config.json")]
    job = subprocess.Popen(command, cwd=repository, start_new_session=True, env=os.environ | {"RAY_ADDRESS": ""})
    folder, deadline_s = (broken.folder / "pairs").path, time.monotonic() + 90
    while not list(folder.glob("pairs-*.parquet")) and time.monotonic() < deadline_s and job.poll() is None:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(timeout=10)
    assert checksums(make_pairs(broken)) == checksums(make_pairs(unbroken))
