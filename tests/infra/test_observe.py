"""`make observe` without a cluster: its configuration is the project's, and what is missing is said."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.local import observe, processes
from infra.local.run import MARK_NAME, LocalRun, Ports
from infra.prometheus.expressions import RULES, rules
from tests.conftest import need_program
from tests.infra import promtool


@pytest.fixture
def run(tmp_path: Path) -> Iterator[LocalRun]:
    """A run that Ray was never started for; whatever carries its mark is ended."""
    folder = tmp_path / "run"
    (folder / "r").mkdir(parents=True)
    found = LocalRun(str(tmp_path), str(folder), f"mark-{tmp_path.name}", Ports(*range(1, 10)))
    yield found
    processes.end(lambda: processes.marked(MARK_NAME, found.mark))


def test_the_project_s_configuration_is_used_with_the_run_s_own_targets(run: LocalRun, tmp_path: Path) -> None:
    need_program("promtool")
    project = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    made = observe.configuration(run)
    (before,), (after,) = project["scrape_configs"], made["scrape_configs"]
    assert after["file_sd_configs"][0].pop("files") == [f"{run.ray_folder}/prom_metrics_service_discovery.json"]
    del before["file_sd_configs"][0]["files"]
    assert before == after and made["global"] == project["global"]
    assert made["rule_files"] == [str(RULES / "*.yml")]
    (tmp_path / "p.yml").write_text(yaml.safe_dump(observe.configuration(run, 0.5)))
    done = promtool.run("check", "config", tmp_path / "p.yml")
    assert done.returncode == 0 and _counted(done) == len(rules()), done.stdout + done.stderr


def _counted(done: subprocess.CompletedProcess[str]) -> int:
    """Rules that promtool found in all files."""
    return sum(int(line.split()[1]) for line in done.stdout.splitlines() if "rules found" in line)


def test_a_real_prometheus_starts_once_scrapes_and_ends_with_the_run_s_mark(run: LocalRun) -> None:
    need_program("prometheus")
    url = observe.start(run)
    assert url.startswith("http://127.0.0.1:") and observe.start(run) == url
    (one,) = processes.marked(MARK_NAME, run.mark)
    assert (Path(run.folder) / observe.FOLDER / observe.LOG).exists()
    assert processes.end(lambda: processes.marked(MARK_NAME, run.mark)) == {one}
    assert observe.start(run) is not None, "another one after it has ended"


def test_what_prometheus_says_is_told_when_it_does_not_start(run: LocalRun, monkeypatch: pytest.MonkeyPatch) -> None:
    need_program("prometheus")
    monkeypatch.setattr(observe, "configuration", lambda *_: {"scrape_configs": [{"job": "x"}]})
    with pytest.raises(observe.ObserveError, match="field job not found"):
        observe.start(run)


def test_a_missing_program_or_run_is_named(
    run: LocalRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROMETHEUS", "/no/such/prometheus")
    with pytest.raises(observe.ObserveError, match="apt-get install prometheus"):
        observe.start(run)
    monkeypatch.setattr(observe, "load", lambda _: None)
    assert observe.main() == 1 and "make demo" in capsys.readouterr().err
