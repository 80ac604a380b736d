"""The distillation job on a real Ray cluster: every stage, its files, and the resume after a crash."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diagonal.model.weights import Release, embedded
from jobs import distill
from jobs.distill import samples
from jobs.fit import fit
from jobs.ode_init import initialise
from jobs.prompts import pair_prompts
from jobs.run import Run
from tests.jobs.conftest import OpenRun

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def rows_of(run: Run) -> list[dict[str, Any]]:
    prompts, updates = pair_prompts(run), run.config.distill.stage1_updates + run.config.distill.stage2_updates
    chosen = samples(len(prompts), run.config.seed, 0, updates * run.config.distill.batch_size)
    return [{"sample": sample, "prompt": prompts[index]} for sample, index in chosen]


def crash_once(settings: dict[str, Any]) -> None:
    """The stage's worker, but the first time it dies right after its second checkpoint."""
    from jobs.fit import Worker

    marker, save, saved = Path(settings["folder"]) / "crashed", Worker._save, []

    def save_then_die(self: Worker, state: Any) -> None:
        save(self, state)
        saved.append(state.update)
        if len(saved) == 2 and not marker.exists():
            marker.touch()
            raise RuntimeError("the test ends this worker")

    Worker._save = save_then_die  # type: ignore[method-assign]
    try:
        distill.train(settings)
    finally:
        Worker._save = save  # type: ignore[method-assign]


@pytest.mark.timeout(300)
def test_a_crashed_stage_goes_on_from_its_checkpoint_to_the_same_weights_bit_for_bit(small_run: OpenRun) -> None:
    unbroken, broken = small_run("unbroken"), small_run("broken")
    fit(unbroken, "distill", distill.train, rows_of(unbroken))
    fit(broken, "distill", crash_once, rows_of(broken))
    assert broken.folder.has("crashed")
    expected, found = (weights(run.folder.path / "stage2") for run in (unbroken, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    started = weights(embedded("ode_init"))
    assert any(not torch.equal(expected[name], started[name]) for name in expected)


@pytest.mark.timeout(300)
def test_the_job_on_two_workers_writes_every_stage_with_its_parent_and_a_release_that_loads(small_run: OpenRun) -> None:
    run = small_run("a", "train.workers=2")
    release = Release.load(str(distill.distill(run)))
    lineage = release.manifest["lineage"]
    assert lineage["stage2"]["parent"] == "a/stage1"
    assert lineage["stage1"]["parent"] == "tiny/ode_init"
    assert (lineage["stage2"]["updates"], lineage["stage2"]["weights"]) == (4, "ema")
    assert release.config == run.config
    assert set(release.manifest["scores"]) >= {"colour", "shape", "direction", "speed"}
    assert run.folder.read_json("config.json")["train"]["workers"] == 2


@pytest.mark.timeout(300)
def test_stage_zero_trains_the_student_on_the_pairs_it_makes_first(small_run: OpenRun) -> None:
    run = small_run("a")
    initialise(run)
    before, after = weights(run.base), weights(run.folder.path / "ode_init")
    assert run.folder.has("pairs/manifest.json")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
