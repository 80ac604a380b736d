"""The distillation job on a real Ray cluster: every stage, its files, and the resume after a crash."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diagonal.errors import FieldError
from diagonal.media.encode import read_mp4
from diagonal.model.base_model import embedded
from diagonal.model.release import Release
from diagonal.training.state import TrainState
from jobs import distill
from jobs.ode_init import initialise
from jobs.runs.run import Run
from jobs.runs.update_log import UPDATES, Record, read_journal
from jobs.workers.control import start_controller
from jobs.workers.data_feed import Feed
from jobs.workers.ray_train import fit_stage
from jobs.workers.reporting import RankInfo, StageHooks
from jobs.workers.watchdog import Watchdog
from jobs.workers.worker import Worker
from tests.jobs.conftest import OpenRun

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]
TIMES = ("update_s", "data_wait_s")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def record(run: Run, stage: str = "distill") -> Record:
    return read_journal(run.folder.read(f"train/{stage}/{UPDATES}").decode().splitlines())


def curve(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in record(run).updates]


def crash_once(worker: Worker, feed: Feed) -> None:
    """The stages' body, but the first time it dies an update after its second checkpoint."""
    save, report, saved = StageHooks.save, StageHooks.report, []

    def count(self: StageHooks, state: TrainState, *, wait: bool = False) -> None:
        save(self, state, wait=True)
        saved.append(state.update)

    def die(self: StageHooks, update: int, figures: Any) -> None:
        report(self, update, figures)
        if len(saved) == 2 and not worker.run.folder.has("crashed"):
            worker.run.folder.write("crashed", b"")
            raise RuntimeError("the test ends this worker")

    StageHooks.save, StageHooks.report = count, die  # type: ignore[method-assign]
    try:
        distill.train(worker, feed)
    finally:
        StageHooks.save, StageHooks.report = save, report  # type: ignore[method-assign]


def refuse(worker: Worker, feed: Feed) -> None:
    """A body that meets a wrong setting, and leaves a mark for each time that it ran."""
    worker.run.folder.write(f"ran-{len(worker.run.folder.children())}", b"")
    raise FieldError("distill.lr", 0, "a number above 0")


def train_here(run: Run) -> None:
    """Both stages in this process, as the only rank: no Ray Train, no restart."""
    place = RankInfo("distill", 0, 1)
    with Worker(run, place, torch.device("cpu"), Watchdog(300, "here"), start_controller(), on_ray=False) as worker:
        distill.train(worker, distill.distill_feed(run))


@pytest.mark.timeout(300)
def test_a_crashed_stage_goes_on_from_its_checkpoint_to_the_same_weights_and_losses(small_run: OpenRun) -> None:
    unbroken, broken = small_run("unbroken"), small_run("broken")
    train_here(unbroken)
    fit_stage(broken, "distill", crash_once, distill.distill_feed(broken))
    assert broken.folder.has("crashed")
    assert [start["start_after"] for start in record(broken).starts] == [0, 2]
    assert curve(broken) == curve(unbroken)
    expected, found = (weights(run.folder.path / "stage2") for run in (unbroken, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    started = weights(embedded("ode_init"))
    assert any(not torch.equal(expected[name], started[name]) for name in expected)


@pytest.mark.timeout(300)
def test_a_run_that_begins_from_another_runs_stage_1_continues_as_that_run_did(small_run: OpenRun) -> None:
    first = small_run("first")
    train_here(first)
    begins = f"distill.init={first.folder}/stage1"
    second = small_run("second", begins)
    train_here(second)
    assert curve(second) == curve(first)[2:]
    expected, found = (weights(run.folder.path / "stage2") for run in (first, second))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(FieldError, match=r"distill\.stage1_updates = 1: allowed is at least 2"):
        train_here(small_run("third", begins, "distill.stage1_updates=1"))


@pytest.mark.timeout(300)
def test_the_job_on_two_workers_writes_stages_pictures_and_a_release_that_loads(small_run: OpenRun) -> None:
    run = small_run("a", "train.workers=2", "distill.batch_size=3", "train.sample_every=2")
    release = Release.load(str(distill.distill(run)))
    lineage = release.manifest["lineage"]
    assert lineage["stage2"]["parent"] == "a/stage1"
    assert lineage["stage1"]["parent"] == "tiny/ode_init"
    assert (lineage["stage2"]["updates"], lineage["stage2"]["weights"]) == (4, "ema")
    assert release.config == run.config
    assert set(release.manifest["scores"]) >= {"colour", "shape", "direction", "speed"}
    assert [entry["samples"] for entry in record(run).updates] == [[0, 2], [3, 5], [6, 8], [9, 11]]
    pictures = run.folder.path / "train" / "distill"
    assert read_mp4(pictures / "samples" / "update-00000004-1.mp4", scale=8).shape == (81, 32, 32, 3)
    assert Image.open(pictures / "samples" / "update-00000002.png").width > 9 * 32
    assert Image.open(pictures / "losses.png").width > 500
    assert list((pictures / "tensorboard").glob("events.out.tfevents.*"))
    summary = run.folder.read_json("summary.json")
    assert summary["scores"] == release.manifest["scores"]
    assert {key: summary["stages"]["distill"][key] for key in ("updates", "skipped", "restarts", "world_sizes")} == {
        "updates": 4,
        "skipped": 0,
        "restarts": 0,
        "world_sizes": [2],
    }
    again = small_run("a", "train.workers=2", "distill.batch_size=3", "train.sample_every=2", resume=True)
    written_ns = (run.folder.path / "summary.json").stat().st_mtime_ns
    assert distill.distill(again) == run.folder / "release"
    assert (run.folder.path / "summary.json").stat().st_mtime_ns == written_ns


@pytest.mark.timeout(300)
def test_stage_zero_trains_the_student_on_the_pairs_it_makes_first(small_run: OpenRun) -> None:
    run = small_run("a")
    initialise(run)
    before, after = weights(run.base), weights(run.folder.path / "ode_init")
    assert run.folder.has("pairs/manifest.json")
    assert [entry["update"] for entry in record(run, "ode_init").updates] == [1, 2]
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.timeout(300)
def test_an_error_that_no_restart_would_mend_ends_the_stage_at_once_as_itself(small_run: OpenRun) -> None:
    run = small_run("a")
    with pytest.raises(FieldError, match=r"distill\.lr = 0: allowed is a number above 0"):
        fit_stage(run, "distill", refuse, distill.distill_feed(run))
    assert sum(name.startswith("ran-") for name in run.folder.children()) == 1
