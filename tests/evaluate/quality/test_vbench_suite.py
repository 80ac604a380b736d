"""VBench's suite is written under the names that VBench reads, and its results give the leaderboard's totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.evaluate.quality.vbench_suite import QUALITY, SEMANTIC, markdown, read_results, suite_prompts, write_suite
from diagonal.media.encode import read_mp4


class Painter:
    """A student that paints a clip of one grey, darker with each that it was asked for."""

    config = Config.from_preset("tiny")

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[int]]] = []

    def __call__(self, captions: list[str], seeds: list[int]) -> Tensor:
        self.asked.append((captions, seeds))
        return torch.full((1, 9, 32, 32, 3), 200 - 10 * len(self.asked), dtype=torch.uint8)


def info_in(folder: Path, *prompts: str) -> str:
    path = folder / "VBench_full_info.json"
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["color"]} for prompt in prompts]))
    return str(path)


def test_each_prompt_has_its_samples_under_its_name_and_a_second_run_makes_the_missing_alone(tmp_path: Path) -> None:
    prompts = suite_prompts(info_in(tmp_path, "a red cat", "rain, at night", "a red cat"))
    assert prompts == ["a red cat", "rain, at night"]
    painter: Any = Painter()
    write_suite(painter, prompts, tmp_path / "suite", 2, 7, lambda line: None)
    names = ["a red cat-0.mp4", "a red cat-1.mp4", "rain, at night-0.mp4", "rain, at night-1.mp4"]
    assert sorted(file.name for file in (tmp_path / "suite").iterdir()) == names
    assert len({seeds[0] for _, seeds in painter.asked}) == 4, "every video has noise of its own"
    assert read_mp4(tmp_path / "suite" / names[0]).shape == (9, 32, 32, 3)
    (tmp_path / "suite" / names[2]).unlink()
    again: Any = Painter()
    write_suite(again, prompts, tmp_path / "suite", 2, 7, lambda line: None)
    assert again.asked == [painter.asked[2]]


def test_results_are_shares_of_the_leaderboards_ranges_and_its_totals(tmp_path: Path) -> None:
    (tmp_path / "a_eval_results.json").write_text(json.dumps({name: [QUALITY[name].high, []] for name in QUALITY}))
    found = read_results(tmp_path)
    assert found["quality"] == pytest.approx(100.0) and found["semantic"] is None and found["total"] is None
    assert found["missing"] == list(SEMANTIC)
    semantic = {name.replace("_", " "): SEMANTIC[name].low for name in SEMANTIC}
    (tmp_path / "b_eval_results.json").write_text(json.dumps(semantic))
    whole = read_results(tmp_path)
    assert (whole["semantic"], whole["total"], whole["missing"]) == (
        pytest.approx(0.0, abs=1e-9),
        pytest.approx(80.0),
        [],
    )
    assert "| **total** | 80.00 |  |" in markdown({"vbench": whole}) and markdown({}) == ""


def test_a_slow_scene_weighs_half_within_its_half(tmp_path: Path) -> None:
    raw = {name: QUALITY[name].low for name in QUALITY} | {"dynamic_degree": 1.0}
    (tmp_path / "a_eval_results.json").write_text(json.dumps(raw))
    assert read_results(tmp_path)["quality"] == pytest.approx(100 * 0.5 / 6.5)


def test_what_is_not_vbenchs_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(FieldError, match="--vbench-info = .*list.json.*entries with prompt_en"):
        suite_prompts(str(tmp_path / "list.json"))
    with pytest.raises(FieldError, match="--vbench-info = '': allowed is the path of VBench's VBench_full_info.json"):
        suite_prompts("")
    (tmp_path / "a_eval_results.json").write_text(json.dumps({"beauty": 1.0}))
    with pytest.raises(FieldError, match=r"VBench's dimension = \['beauty'\]"):
        read_results(tmp_path)
    painter: Any = Painter()
    with pytest.raises(FieldError, match="prompt of the suite = 'a/b'"):
        write_suite(painter, ["a/b"], tmp_path, 1, 0)
