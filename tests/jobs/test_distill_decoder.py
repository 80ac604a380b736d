"""The job of the fast decoder: a release with it, from a run that can be cut off; and the report of what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diagonal.errors import FieldError
from diagonal.evaluate.quality import serving_options as evaluation
from diagonal.model.release import Release
from jobs import distill_decoder as job
from jobs.benchmarks import serving_options as report
from tests.jobs.conftest import OpenRun

SETTINGS = (
    "decoder.widths=[8,6,4]",
    "decoder.blocks=[1,1,1]",
    "decoder.clips=2",
    "decoder.updates=4",
    "decoder.batch_size=1",
    "decoder.frames=2",
    "decoder.checkpoint_every=2",
    "serve.decoder=fast",
)


@pytest.mark.slow
def test_a_run_cut_off_resumes_and_ends_in_a_release_with_the_fast_decoder(
    small_run: OpenRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = small_run("a", *SETTINGS)
    keep = job._save

    def cut_off(run: object, training: object) -> None:
        keep(run, training)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        job.distil_decoder(run, job.source_of(run, None))
    assert run.folder.has(job.CHECKPOINT) and not run.folder.has("decoder/lineage.json")
    monkeypatch.setattr(job, "_save", keep)
    target = job.distil_decoder(run, job.source_of(run, None))
    assert "resumes after update 2" in capsys.readouterr().out
    release = Release.load(str(target))
    assert "decoder/config.json" in release.manifest["files"] and release.config.serve.decoder == "fast"
    lineage = release.manifest["lineage"]["decoder"]
    assert (lineage["parent"], lineage["updates"], lineage["clips"]) == (Release.load().name, 4, 2)
    assert 20 < lineage["psnr_db"] < 60 and lineage["flops_per_latent_frame"] > 1e5
    assert lineage["parameters"] > 10_000

    made = target.children()
    assert job.distil_decoder(run, release) == target and target.children() == made, "done already"

    monkeypatch.setattr(evaluation, "TIMED_ROUNDS", 1)
    report.work(["fast-decoder", "--release", str(target), "--clips", "1", "--out", str(tmp_path / "report")])
    found = json.loads((tmp_path / "report.json").read_text())
    full, fast = found["rows"]
    assert full["psnr_db"] is None and full["name"] == "full" and 15 < fast["psnr_db"] < 60
    assert 0 < fast["chunk_ms"]["least"] <= fast["chunk_ms"]["median"] and found["decoder"] == lineage
    text = (tmp_path / "report.md").read_text()
    assert "| fast |" in text and found["command"] in text and "load" in text


@pytest.mark.slow
def test_a_release_must_be_given_where_the_run_has_none(small_run: OpenRun) -> None:
    run = small_run("a")
    assert job.source_of(run, None).name == Release.load().name
    object.__setattr__(run, "config", run.config.with_settings(["preset=wan-1.3b"]))
    with pytest.raises(FieldError, match="--release = None: allowed is a release"):
        job.source_of(run, None)
