"""The demo's own steps: it shows a job's output and failure, finds the run that was made, and judges its file."""

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from diagonal.data.world import WorldConfig, render
from infra.local import demo
from infra.local.run import LocalRun, Ports

PROGRESS = demo.Progress()


@pytest.fixture()
def run(tmp_path: Path) -> LocalRun:
    """A run that was never started, rooted in an empty folder."""
    return LocalRun(str(tmp_path), str(tmp_path / "diagonal-none"), "no-mark", Ports(*range(1, 10)))


def write_video(path: Path, pixels: NDArray[np.uint8], fps: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "10"})
        stream.height, stream.width = pixels.shape[1:3]
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def enlarged(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def test_the_oracle_reads_the_scene_back_from_an_encoded_and_enlarged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = render(demo.SCENE, 3, WorldConfig(pixel_frames=demo.FRAMES))
    reading = demo.judge(write_video(tmp_path / "x.mp4", enlarged(pixels, 4), demo.FPS), PROGRESS)
    scene = demo.SCENE
    assert (reading.colour, reading.shape, reading.direction, reading.speed) == (
        scene.colour,
        scene.shape,
        scene.direction,
        scene.speed,
    )
    assert "81 frames at 16 fps" in capsys.readouterr().out


@pytest.mark.parametrize(("frames", "fps"), [(demo.FRAMES - 1, demo.FPS), (demo.FRAMES, demo.FPS + 1)])
def test_a_file_of_another_length_or_rate_is_refused(tmp_path: Path, frames: int, fps: int) -> None:
    pixels = render(demo.SCENE, 3, WorldConfig(pixel_frames=frames))
    path = write_video(tmp_path / "x.mp4", enlarged(pixels, 2), fps)
    with pytest.raises(demo.ServiceError, match=f"{frames} frames at {fps} fps"):
        demo.judge(path, PROGRESS)


def test_reducing_undoes_enlarging_exactly() -> None:
    pixels = render(demo.SCENE, 3, WorldConfig(pixel_frames=2))
    assert np.array_equal(demo.reduced(enlarged(pixels, 8), 32), pixels)
    with pytest.raises(demo.ServiceError, match="multiples"):
        demo.reduced(enlarged(pixels, 8), 48)


def test_a_job_shows_its_output_and_sees_the_cluster(run: LocalRun, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(run.root) / "job.py"
    script.write_text("import os; print('to', os.environ['RAY_API_SERVER_ADDRESS'], 'in', os.getcwd())")
    demo.run_job(run, f"{sys.executable} job.py", 30.0, PROGRESS)
    assert f"    to {run.dashboard_url} in {run.root}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "message"), [("raise SystemExit(3)", "ended with 3"), ("import time; time.sleep(30)", "more than 1 s")]
)
def test_a_job_that_fails_or_hangs_stops_the_demo(run: LocalRun, program: str, message: str) -> None:
    (Path(run.root) / "job.py").write_text(program)
    with pytest.raises(demo.ServiceError, match=message):
        demo.run_job(run, f"{sys.executable} job.py", 1.0 if "sleep" in program else 30.0, PROGRESS)


def test_the_release_that_the_job_made_is_found_among_older_ones(
    run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Path(run.root) / "runs"
    (runs / "older" / "release").mkdir(parents=True)
    (Path(run.root) / "job.py").write_text(
        "import os, sys; os.makedirs('runs/scratch/release' if '--from-scratch' in sys.argv else 'runs/new/release')"
    )
    monkeypatch.setattr(demo, "DISTIL", f"{sys.executable} job.py")
    assert demo.train(run, demo.Options(True, False), PROGRESS) == runs / "new" / "release"
    assert demo.train(run, demo.Options(True, True), PROGRESS) == runs / "scratch" / "release"
    (Path(run.root) / "job.py").write_text("print('nothing made')")
    with pytest.raises(demo.ServiceError, match="made no runs/"):
        demo.train(run, demo.Options(True, False), PROGRESS)


def test_a_flag_is_zero_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEP", "0")
    monkeypatch.setenv("FROM_SCRATCH", "")
    assert demo.Options.from_environment() == demo.Options(keep=False, from_scratch=False)
    monkeypatch.setenv("KEEP", "yes")
    with pytest.raises(demo.ServiceError, match="KEEP = 'yes': allowed is 0 or 1"):
        demo.Options.from_environment()


def test_the_job_is_the_literal_line() -> None:
    assert demo.DISTIL == "ray job submit -- python jobs/distill.py"
