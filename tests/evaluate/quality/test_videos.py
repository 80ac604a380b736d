"""Figures of any video file, in bounded memory; VBench where it is, and what is missing where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from diagonal.errors import FieldError
from diagonal.evaluate.quality import vbench
from diagonal.evaluate.quality.videos import markdown, measure_all, measure_video, slopes, windows
from diagonal.media.encode import write_mp4

FPS = 8
FAKE = '''
"""Stands for VBench: keeps its calls' form, gives each dimension's length as its score."""
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.out = output_path
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, mode="vbench_standard"):
        assert local and mode == "custom_input" and os.listdir(videos_path)
        if dimension_list == ["imaging_quality"]:
            import a_package_that_is_not_there
        scores = {one: [float(len(one)), []] for one in dimension_list}
        json.dump(scores, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
'''


def fading(seconds: float) -> np.ndarray:
    """A square on grey whose colour fades to grey, and moves."""
    frames = round(seconds * FPS)
    video = np.full((frames, 64, 64, 3), 110, np.uint8)
    for index in range(frames):
        share, at = 1 - index / frames, (2 * index) % 40
        video[index, 16:48, at : at + 24] = 110 + np.array([120, -90, -90]) * share
    return video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_mp4(folder / "long.mp4", fading(10.0), FPS)
    write_mp4(folder / "short.mp4", fading(1.0), FPS)
    return folder


def test_a_video_is_read_window_by_window(folder: Path) -> None:
    found = list(windows(folder / "long.mp4"))
    assert [round(time_s, 2) for time_s, _ in found] == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert all(pixels.shape == (2 * FPS, 64, 64, 3) for _, pixels in found)


def test_fading_colour_is_a_falling_slope_of_saturation(folder: Path) -> None:
    found = measure_video(folder / "long.mp4")
    assert found["means"]["motion"] > 0 and found["slopes"]["saturation"] < -0.5
    assert measure_video(folder / "short.mp4")["slopes"] == {}


def test_a_folder_gives_a_table_that_says_what_was_too_short_and_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vbench", None)
    monkeypatch.setattr(vbench.importlib.util, "find_spec", lambda name: None)
    report = {
        **measure_all(str(folder), print),
        "date": "d",
        "machine": "m",
        "command": "c",
        "vbench": vbench.evaluate(str(folder), "cpu"),
    }
    assert report["vbench"]["scores"] == {} and set(report["vbench"]["missing"]) == set(vbench.DIMENSIONS)
    page = markdown(report)
    assert "| short.mp4" in page and "too short" in page and "package vbench is not installed" in page
    assert set(measure_all(str(folder / "short.mp4"))["videos"]) == {"short.mp4"}


def test_vbench_runs_the_dimensions_whose_weights_are_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "__init__.py").write_text(FAKE)
    for name in ("clip_model/ViT-B-32.pt", "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"):
        (tmp_path / "weights" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vbench", raising=False)
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))
    found = vbench.evaluate(str(folder), "cpu")
    sys.modules.pop("vbench")  # monkeypatch would put it back
    assert found["scores"] == {"background_consistency": float(len("background_consistency"))}
    assert "amt-s.pth" in found["missing"]["motion_smoothness"]
    assert "a_package_that_is_not_there" in found["missing"]["imaging_quality"]


def test_what_is_no_video_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="--videos"):
        measure_all(str(tmp_path))
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    with pytest.raises(FieldError, match=r"video = .*broken.mp4"):
        measure_all(str(tmp_path))


def test_slopes_are_of_a_hundred_and_eighty_seconds_and_of_the_windows_asked_for() -> None:
    times = [1.0, 3.0, 5.0, 100.0]
    assert slopes(times, [[0.1, 0.3, 0.5, 0.0]], 5.0) == pytest.approx([18.0])
    assert slopes(times, [[0.1, 0.3, 0.5, 0.0]], 2.0) == []
    assert slopes(times, [[0.7] * 4, [1.0] * 4], 180.0) == [0.0, 0.0]
