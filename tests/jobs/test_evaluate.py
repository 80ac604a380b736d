"""The evaluation job: a report that resumes, a gate that serving keeps to; and the search with its serving profile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.evaluate.experiments.search import Point, grid, pareto, parse_context, profile
from diagonal.evaluate.quality.sources import Student
from diagonal.model.base_model import embedded
from diagonal.model.manifest import ReleaseError
from diagonal.model.release import Release, write_release
from jobs import evaluate, search
from jobs.benchmarks import experiments
from serve.settings import ServeSettings

BASE = Config.from_preset("tiny")


def baseline_in(folder: Path) -> Path:
    """The embedded student as if it had been trained as Self Forcing is."""
    student, release = Path(shutil.copytree(embedded("ode_init"), folder / "student")), folder / "baseline"
    Config.load(student / "config.json").with_settings(["schedule.steps=self-forcing"]).save(student / "config.json")
    write_release(release, name="baseline", student=student, base=embedded("base"), lineage={}, scores={})
    return release


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of the embedded release that the gate judged by far too few clips, and the arguments."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(embedded("release"), folder / "release")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle moving left quickly\na blue square moving up slowly\n")
    argv = [
        "--release",
        str(folder / "release"),
        "--clips",
        "2",
        "--streams",
        "1",
        "--seconds",
        "6",
        "--gate",
        "--baseline",
        str(baseline_in(folder)),
        "--prompts",
        str(prompts),
        "--parts",
        str(folder / "parts"),
        "--out",
        str(folder / "out"),
    ]
    evaluate.work(argv)
    return folder, argv


def report_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


@pytest.mark.slow
def test_the_report_compares_all_sources_from_equal_noise(judged: tuple[Path, list[str]]) -> None:
    found = report_in(judged[0])
    rows = {row["name"]: row for row in found["rows"]}
    assert {name: row["forwards"] for name, row in rows.items()} == {
        "codec alone (ceiling)": 0,
        "teacher": 40,
        "ours": 17,
        "self-forcing": 35,
    }
    assert all(row["fps"] > 0 for row in rows.values())
    assert rows["ours"]["figures"]["psnr_db"]["mean"] > 10 and "frechet" in rows["ours"]
    assert set(found["differences"]) == {"teacher", "self-forcing"} and found["drift"]["streams"] == 1
    for name in ("out.md", "out-ours.png", "out-teacher.png", "out-drift.png"):
        assert (judged[0] / name).stat().st_size > 500
    assert "## Gate: not promoted" in (judged[0] / "out.md").read_text()


@pytest.mark.slow
def test_what_the_gate_writes_is_what_serving_keeps_to(judged: tuple[Path, list[str]]) -> None:
    release = Release.load(judged[0] / "release")
    assert release.manifest["promotion_reasons"] == report_in(judged[0])["verdict"]["reasons"]
    with pytest.raises(
        ReleaseError, match=r"not promoted: clips = 2: at least 100 .* drift was not measured over 180 s"
    ):
        release.check_promoted()
    assert release.manifest["scores"]["colour"]["count"] == 2


@pytest.mark.slow
def test_a_second_run_reads_what_the_first_one_made(
    judged: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = report_in(judged[0])
    monkeypatch.setattr(Student, "__call__", _unasked)
    monkeypatch.setattr(evaluate, "drift_part", _unasked)
    evaluate.work(judged[1])
    assert report_in(judged[0])["rows"] == before["rows"] and report_in(judged[0])["drift"] == before["drift"]


def _unasked(*arguments: object, **more: object) -> None:
    raise AssertionError("clips were made again")


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--clips", "1"], "--clips = 1"),
        (["--gate"], "--gate"),
        (["--gate", "--release", "r"], "--baseline = '': allowed is with --gate"),
        (["--vbench"], "--vbench"),
        (["--seconds", "2"], "--seconds = 2.0"),
        (["--streams", "-1"], "--streams = -1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(argv: list[str], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        evaluate.work(argv)


def test_a_prompt_that_the_oracle_cannot_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat on a sofa\n")
    with pytest.raises(FieldError, match="prompt = 'a cat on a sofa'"):
        evaluate.work(["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")])


def test_the_pareto_set_holds_what_nothing_beats() -> None:
    costs = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 4.0}
    assert pareto(costs, {"a": 0.5, "b": 0.4, "c": 0.7, "d": 0.7, "e": 0.9}) == ["a", "c", "e"]


def test_a_grid_leaves_out_what_a_schedule_refuses_and_names_what_none_allows() -> None:
    names = [point.name for point in grid(BASE, ["4322222", "1"], ["reuse", 0.5], [])]
    assert names == ["4322222, reuse", "4322222, 0.500", "1, 0.500"]
    assert [point.gamma for point in grid(BASE, ["2"], ["reuse"], [0.0, 1.0])] == [0.0, 1.0]
    for text in ("2", "noise"):
        with pytest.raises(FieldError, match=f"--contexts = '{text}'"):
            parse_context(text)
    with pytest.raises(FieldError, match="schedule.steps"):
        grid(BASE, ["49"], [0.0], [])


def test_a_profile_is_not_inferior_and_serving_takes_it() -> None:
    points = {point.name: point for point in (Point("4322222", "reuse"), Point("4", "reuse"), Point("2", "reuse"))}
    worth = {"4322222, reuse": 0.899, "4, reuse": 0.9, "2, reuse": 0.7}
    rows = {
        name: {"forwards": forwards, "quality": [worth[name]] * 50}
        for name, forwards in (("4322222, reuse", 17), ("4, reuse", 28), ("2, reuse", 14))
    }
    found = profile("r1", points, rows, "forwards", 2.0)
    assert found["evidence"]["chosen"] == "4322222, reuse" and found["evidence"]["best"] == "4, reuse"
    settings = ServeSettings(options=found["options"]).release_settings
    assert Release.load().with_settings(settings).config.serve.degraded_steps == "2"
    assert BASE.with_settings(found["settings"]).schedule.steps == "4322222"


@pytest.mark.slow
def test_a_search_keeps_its_rows_and_adds_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "--steps",
        "4322222",
        "--clips",
        "2",
        "--cost",
        "forwards",
        "--folder",
        str(tmp_path / "rows"),
        "--out",
        str(tmp_path / "found"),
    ]
    search.work(argv)
    monkeypatch.setattr(search, "_measure", _unasked)
    search.work(argv)
    monkeypatch.undo()
    search.work([*argv, "--steps", "4322222", "2"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["forwards"] for row in found["rows"]] == [14, 17] and (tmp_path / "found.png").is_file()
    assert len(list((tmp_path / "rows" / "rows").glob("*.json"))) == 2
    assert json.loads((tmp_path / "found-profile.json").read_text())["settings"][0].startswith("schedule.steps=")


@pytest.mark.slow
def test_the_page_of_experiments_is_written_from_its_json_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "quality")]
    experiments.work(["collect", "--preset", "tiny", "--folder", str(tmp_path), "--seeds", "0", "1", *out])
    text = (tmp_path / "quality.md").read_bytes()
    commands = [entry["command"] for entry in json.loads((tmp_path / "quality.json").read_text())["experiments"]]
    budget = "--updates 360 --clips 2000 --fewer-clips 500 --streams 16 --seconds 180 --seeds 0 1 --preset tiny"
    assert commands[0] == f"python jobs/benchmarks/experiments.py run table1 {budget}"
    (tmp_path / "quality.md").unlink()
    (readme := tmp_path / "README.md").write_text(
        "# A\n<!-- the quality page's claim -->\nold\n<!-- end of it -->\nb\n"
    )
    experiments.work(["page", "--readme", str(readme), *out])
    assert (
        "-->\nQuality on the embedded world was not measured yet.\n<!--" in readme.read_text()
        and "old" not in readme.read_text()
    )
    assert (tmp_path / "quality.md").read_bytes() == text
    experiments.work(["list"])
    assert "fig9" in capsys.readouterr().out
    with pytest.raises(FieldError, match="experiment"):
        experiments.work(["run"])


@pytest.mark.slow
def test_the_gate_compares_with_no_release_that_was_trained_otherwise(judged: tuple[Path, list[str]]) -> None:
    folder, argv = judged
    own = [str(folder / "release") if word.endswith("baseline") and word != "--baseline" else word for word in argv]
    with pytest.raises(FieldError, match=r"--baseline = .*4322222.*: allowed is a release that was trained with"):
        evaluate.work(own)
