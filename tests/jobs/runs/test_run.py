"""A run's folder: made once, continued only with the configuration that it began with."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diagonal.config import Config
from diagonal.errors import FieldError
from jobs.runs.arguments import run_options
from jobs.runs.run import FREE_FIELDS, _leaves, main, open_run
from tests.jobs.conftest import OpenRun


def test_a_run_goes_on_under_its_name_with_the_same_configuration(small_run: OpenRun) -> None:
    first = small_run("a")
    again = small_run("a", resume=True)
    assert again == first
    assert Config.load(first.folder.path / "config.json") == first.config


def test_a_name_that_a_run_has_is_refused_without_resume(small_run: OpenRun) -> None:
    small_run("a")
    with pytest.raises(FieldError, match=r"--name = 'a': allowed is a name that no run in .* has; or --resume"):
        small_run("a")


def test_resume_needs_a_run_that_exists(small_run: OpenRun) -> None:
    with pytest.raises(FieldError, match=r"--resume = 'a': allowed is a run that exists in "):
        small_run("a", resume=True)


def test_resume_without_settings_takes_the_configuration_that_the_run_began_with(tmp_path: Path) -> None:
    storage = f"--set=train.storage={tmp_path}"
    first = open_run(run_options(["--name=a", "--preset=wan-1.3b", "--set=distill.lr=1", storage], ""))
    assert open_run(run_options(["--name=a", "--resume", storage], "")) == first


def test_a_resumed_run_may_change_where_it_runs_and_says_so_in_its_history(small_run: OpenRun) -> None:
    first = small_run("a")
    again = small_run("a", "train.workers=2", "train.min_workers=1", resume=True)
    assert again.identity == first.identity
    assert Config.from_dict(first.folder.read_json("config.json")) == again.config
    began, resumed = first.folder.read_json("history.json")["events"]
    assert (began["event"], resumed["event"]) == ("began", "resumed")
    assert resumed["changed"] == {"train.workers": [1, 2], "train.min_workers": [0, 1]}


def test_every_free_field_is_a_field_of_the_configuration() -> None:
    known = {key for key, _ in _leaves(Config().to_dict())}
    assert known >= FREE_FIELDS


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    open_run(run_options(["--name=a", "--dry-run", f"--set=train.storage={tmp_path / 'runs'}"], ""))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("field", "value", "began"),
    [
        ("distill.lr", "0.5", "0.0002"),
        ("distill.batch_size", "8", "2"),
        ("seed", "7", "0"),
        ("distill.loss.motion", "0.25", r"[\d.]+"),
    ],
)
def test_a_run_is_not_continued_with_another_configuration(
    small_run: OpenRun, field: str, value: str, began: str
) -> None:
    files = small_run("a").folder.files()
    with pytest.raises(FieldError, match=rf"{field} = {value}: allowed is {began}, as run 'a' began with"):
        small_run("a", f"{field}={value}", resume=True)
    assert small_run("a", resume=True).folder.files().keys() == files.keys()


@pytest.mark.parametrize("name", ["../a", ".a", "a/b"])
def test_a_run_name_cannot_leave_its_storage(small_run: OpenRun, name: str) -> None:
    with pytest.raises(FieldError, match="--name"):
        small_run(name)


def test_runs_without_a_name_get_new_ones(tmp_path: Path) -> None:
    arguments = run_options([f"--set=train.storage={tmp_path}"], "")
    assert open_run(arguments).folder != open_run(arguments).folder


def test_from_scratch_is_for_the_embedded_preset_alone(tmp_path: Path) -> None:
    arguments = run_options(["--preset=wan-1.3b", "--from-scratch", f"--set=train.storage={tmp_path}"], "")
    with pytest.raises(FieldError, match="--from-scratch"):
        open_run(arguments)


@pytest.mark.slow
def test_wrong_input_ends_a_job_with_one_line_and_status_2(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "jobs/distill.py", "--set", f"train.storage={tmp_path / 'runs'}", "--preset", "huge"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
    assert "preset = 'huge'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "distill.lrr=1"], "distill.lrr"),
        (["--set", "schedule.steps=4x"], "schedule.steps = '4x'"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--set", "train.workers=17"], "distill.batch_size = 16: allowed is at least train.workers = 17"),
        (["--set", "distill.prompts=nowhere.txt"], "nowhere.txt'"),
        (["--set", "distill.init=nowhere"], "nowhere"),
    ],
)
def test_all_wrong_input_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a job's process has a handler of its own; this one not
    monkeypatch.setattr(sys, "argv", ["distill", "--set", f"train.storage={tmp_path / 'runs'}", *arguments])
    with pytest.raises(SystemExit) as ended:
        main("jobs.distill")
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("error: ")) == (2, 1), told
    assert said in told
