"""The pairs job: shards that a killed run finds again, the same bytes however often it was cut off, faults that end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray

from diagonal.data.pair_set import Shard, shard_file, usable_places
from diagonal.errors import FieldError
from diagonal.model.base_model import embedded
from diagonal.storage import Folder
from jobs.pairs import check_seen, make_pairs, usable_pairs
from jobs.runs.arguments import run_options
from jobs.runs.prompts import pair_prompts, training_prompts
from jobs.runs.run import JobFailed, Run
from tests.data.rows import spoil
from tests.jobs.conftest import OpenRun

MANY = ("pairs.count=32",)  # sixteen shards: time for a fault in their midst


def files_of(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.files() if not name.startswith("usable")}


@pytest.fixture(scope="module")
def unbroken(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, bytes]]]:
    """The files of runs that nothing disturbed, by their settings."""
    from jobs.runs.run import open_run
    from tests.jobs.conftest import SMALL

    found, storage = {}, tmp_path_factory.mktemp("unbroken")
    for name, settings in (("small", ()), ("many", MANY)):
        chosen = [f"--set={setting}" for setting in (f"train.storage={storage}", *SMALL, *settings)]
        run = open_run(run_options(["--preset=tiny", "--name", name, *chosen], ""))
        found[name] = files_of(make_pairs(run))
    yield found


def test_the_set_holds_every_sample_once_under_one_plan(unbroken: Any) -> None:
    files = unbroken["small"]
    assert sorted(files) == ["manifest.json", *(f"pairs-{shard:06d}.parquet" for shard in range(3)), "plan.json"]
    manifest = json.loads(files["manifest.json"])
    assert (manifest["rows"], [entry["rows"] for entry in manifest["shards"]]) == (5, [2, 2, 1])
    assert manifest["plan"] == json.loads(files["plan.json"])


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_lost_shards_solves_those_alone_and_ends_with_the_same_bytes(
    small_run: OpenRun, unbroken: Any
) -> None:
    run = small_run("a")
    folder = run.folder / "pairs"
    for name, data in unbroken["small"].items():
        folder.write(name, data)
    folder.remove("manifest.json")
    spoil(folder, "pairs-000001.parquet", -1)  # the end of the footer
    folder.remove("pairs-000002.parquet")
    (folder.path / ".pairs-000002.parquet.0.tmp").write_bytes(b"half")
    kept_ns = (folder.path / "pairs-000000.parquet").stat().st_mtime_ns
    make_pairs(run)
    assert files_of(folder) == unbroken["small"]
    assert (folder.path / "pairs-000000.parquet").stat().st_mtime_ns == kept_ns
    assert not list(folder.path.glob(".*.tmp"))


def test_a_finished_set_is_not_touched_again(small_run: OpenRun, unbroken: Any) -> None:
    run = small_run("a")
    for name, data in unbroken["small"].items():
        (run.folder / "pairs").write(name, data)
    make_pairs(run)
    assert files_of(run.folder / "pairs") == unbroken["small"]


def test_corrupt_pairs_are_left_out_of_training_once_and_for_all(small_run: OpenRun, unbroken: Any) -> None:
    run = small_run("a", "pairs.max_bad_share=0.5")
    folder = run.folder / "pairs"
    for name, data in unbroken["small"].items():
        folder.write(name, data)
    spoil(folder, "pairs-000001.parquet", -1)
    places = usable_pairs(run)
    assert places == [("pairs-000000.parquet", 0), ("pairs-000000.parquet", 1), ("pairs-000002.parquet", 0)]
    gone = folder.read_json("usable.json")["quarantined"]
    assert [(row["sample"], row["reason"]) for row in gone] == [(2, "unreadable"), (3, "unreadable")]
    spoil(folder, "pairs-000002.parquet", -1)  # later: the order must not change under a training that has begun
    assert usable_pairs(run) == places == usable_places(folder)


def test_too_many_corrupt_pairs_end_the_run_and_are_named(small_run: OpenRun, unbroken: Any) -> None:
    run = small_run("a")
    for name, data in unbroken["small"].items():
        (run.folder / "pairs").write(name, data)
    (run.folder / "pairs").remove("pairs-000002.parquet")
    with pytest.raises(FieldError, match=r"share of rows quarantined = 0\.2: .*sample 4, prompt None: unreadable"):
        usable_pairs(run)


def test_too_many_rows_set_aside_by_the_solving_end_the_run_before_more_is_solved(
    small_run: OpenRun, unbroken: Any
) -> None:
    run = small_run("a")
    folder = run.folder / "pairs"
    folder.write("plan.json", unbroken["small"]["plan.json"])
    aside = [{"sample": sample, "prompt_id": f"id{sample}", "reason": "not_finite"} for sample in (2, 3)]
    folder.write_json("quarantined/pairs-000001.json", aside)
    with pytest.raises(
        FieldError, match=r"quarantined = 0\.4: .*max_bad_share = 0\.01; sample 2, prompt id2: not_finite"
    ):
        make_pairs(run)


def test_a_shard_that_the_job_does_not_see_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="train.storage = .*node wrote pairs-000003.parquet to one of its own"):
        check_seen(Folder(str(tmp_path)), Shard(3, 2, 10, "x"), within_s=0.0)
    check_seen(Folder(str(tmp_path)), Shard(3, 0, 0, ""), within_s=0.0)  # a shard of bad rows alone has no file


def test_a_runs_prompts_are_kept_and_read_again_whatever_becomes_of_their_file(
    small_run: OpenRun, tmp_path: Path
) -> None:
    source = tmp_path / "p.txt"
    source.write_text("\n".join(f"prompt {number}" for number in range(300)))
    run = small_run("a", f"pairs.prompts={source}", "prompts.held_out_share=0.1")
    first = list(pair_prompts(run))
    source.unlink()
    assert list(pair_prompts(run)) == first == list(training_prompts(run))
    held_out = pq.read_table((run.folder / "prompts").path / "held_out.parquet")["prompt"].to_pylist()
    assert 10 < len(held_out) < 60 and sorted([*first, *held_out]) == sorted(f"prompt {n}" for n in range(300))


def test_distillation_takes_its_own_prompts_where_they_are_given(small_run: OpenRun, tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    run = small_run("a", f"distill.prompts={source}", "prompts.held_out_share=0")
    assert list(training_prompts(run)) == ["a", "b"] and len(pair_prompts(run)) == 130
    assert (run.folder / "prompts/distill").has("manifest.json")


def solvers() -> list[psutil.Process]:
    """The processes of this cluster, and of no other, that solve trajectories."""
    session = str(ray.get_runtime_context().get_temp_dir())
    raylets = [
        p
        for p in psutil.process_iter(["name", "cmdline"])
        if p.info["name"] == "raylet" and session in " ".join(p.info["cmdline"] or ())
    ]
    return [child for raylet in raylets for child in raylet.children(recursive=True) if is_solver(child)]


def is_solver(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and "SolveShard" in " ".join(process.cmdline())
    return False


def killing(folder: Folder, killed: list[int]) -> Callable[[], None]:
    """Ends the solver when the second shard is there."""

    def kill() -> None:
        until_s = time.monotonic() + 200
        while time.monotonic() < until_s and not folder.has(shard_file(1)):
            time.sleep(0.02)
        while time.monotonic() < until_s and not killed:
            for process in solvers():
                with suppress(psutil.NoSuchProcess):  # one that another set's end is ending
                    process.kill()
                    killed.append(process.pid)

    return kill


def make_with_a_solver_killed(run: Run) -> None:
    killed: list[int] = []
    thread = threading.Thread(target=killing(run.folder / "pairs", killed), daemon=True)
    thread.start()
    try:
        make_pairs(run)
    finally:
        thread.join(210)
        assert killed


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_solver_that_is_killed_is_replaced_and_the_bytes_are_the_same(small_run: OpenRun, unbroken: Any) -> None:
    run = small_run("a", *MANY)
    make_with_a_solver_killed(run)
    assert files_of(run.folder / "pairs") == unbroken["many"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.nightly
def test_a_solver_lost_once_too_often_ends_the_job_and_the_rerun_keeps_its_shards(
    small_run: OpenRun, unbroken: Any
) -> None:
    run = small_run("a", *MANY, "train.max_failures=0")
    with pytest.raises(JobFailed, match="pairs failed: .*died[^$]*finished shards are kept"):
        make_with_a_solver_killed(run)
    folder = run.folder / "pairs"
    kept = {name: (folder.path / name).stat().st_mtime_ns for name in folder.files() if name.startswith("pairs-")}
    assert kept
    make_pairs(run)
    assert files_of(folder) == unbroken["many"]
    assert all((folder.path / name).stat().st_mtime_ns == before_ns for name, before_ns in kept.items())


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_no_solver_can_load_ends_the_job_with_its_error(small_run: OpenRun, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(embedded("base"), base)
    (weights,) = (base / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(JobFailed, match=r"^pairs failed: FieldError: transformer weights = .*\n.*shards are kept"):
        make_pairs(small_run("a", f"model.path={base}"))


@pytest.fixture
def scratch() -> Iterator[str]:
    """A short path for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="dp-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def job(repository: Path, scratch: str, storage: str, *arguments: str) -> subprocess.Popen[str]:
    from tests.jobs.conftest import SMALL

    settings = [f"--set={setting}" for setting in (f"train.storage={storage}", *SMALL, *MANY)]
    command = [sys.executable, "jobs/pairs.py", "--preset=tiny", "--name=a", *settings, *arguments]
    environment = os.environ | {"RAY_ADDRESS": "", "RAY_TMPDIR": scratch}
    return subprocess.Popen(
        command,
        cwd=repository,
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("where", [pytest.param("local", marks=pytest.mark.nightly), "s3"])
def test_a_job_that_is_killed_whole_goes_on_to_the_bytes_of_an_unbroken_one(
    where: str, unbroken: Any, repository: Path, tmp_path: Path, scratch: str, bucket: str
) -> None:
    storage = str(tmp_path / "runs") if where == "local" else f"s3://{bucket}/runs"
    folder, until_s = Folder(f"{storage}/a/pairs"), time.monotonic() + 250
    first = job(repository, scratch, storage)
    while not folder.has(shard_file(1)) and time.monotonic() < until_s and first.poll() is None:
        time.sleep(0.02 if folder.is_local else 0.3)  # an S3 that is asked all the time answers the job late
    end(first)
    kept = {name: data for name, data in files_of(folder).items() if name.startswith("pairs-")}
    assert kept and not folder.has("manifest.json")
    if where == "s3":
        cut_off = min(kept)  # which worker was first is chance
        folder.write(cut_off, kept.pop(cut_off)[:-30])
    second = job(repository, scratch, storage, "--resume")
    said, _ = second.communicate(timeout=200)
    assert second.returncode == 0, said
    assert f"16 shards of which {16 - len(kept)} are to be made" in said
    assert files_of(folder) == unbroken["many"]


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL the job and every process that its own Ray started."""
    family = [*psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        if child.is_running():
            child.kill()
    process.communicate(timeout=20)
