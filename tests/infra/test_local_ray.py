"""Laws of the local Ray cluster: private, in its own place, and ended exactly."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from diagonal import cli
from infra.local import cluster, ports, processes, verbs
from infra.local.run import MARK_NAME, LocalRun, load, state_path

JOB = '''
"""A job that says where it runs."""
import os, ray
ray.init(logging_level="ERROR")
print("job in", os.getcwd(), "cpus", int(ray.cluster_resources()["CPU"]))
'''

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for the repository: it holds the job of the literal line."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "distill.py").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Iterator[LocalRun]:
    """A started local cluster, ended after the last test of this file."""
    try:
        yield cluster.start(root)
    finally:
        cluster.stop(root)


def job_api_status(run: LocalRun, token: str | None, body: bytes | None = None) -> int:
    request = urllib.request.Request(f"{run.dashboard_url}/api/jobs/", data=body)
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize("job", ["distill", "absent"])
def test_the_literal_line_runs_the_job_in_the_repository_root_or_fails(run: LocalRun, root: Path, job: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    line = f"ray job submit -- python jobs/{job}.py".split()
    done = subprocess.run(
        line, env=environment | run.environment(), cwd="/", capture_output=True, text=True, timeout=90
    )
    assert (done.returncode == 0) == (job == "distill"), done.stdout + done.stderr
    if done.returncode == 0:
        assert f"job in {root} cpus {max(cluster.LOGICAL_CPUS, os.cpu_count() or 1)}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("body", [None, b'{"entrypoint": "id"}'], ids=["list", "submit"])
def test_the_job_api_refuses_whoever_has_no_token(run: LocalRun, body: bytes | None) -> None:
    assert job_api_status(run, None, body) == 401
    assert job_api_status(run, "wrong" * 12, body) in (401, 403)
    assert job_api_status(run, run.token_path.read_text()) == 200


@pytest.mark.slow
def test_secrets_are_readable_by_the_owner_alone(run: LocalRun, root: Path) -> None:
    for path in (run.token_path, state_path(root)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(run.folder).stat().st_mode) == 0o700
    assert run.token_path.read_text() not in state_path(root).read_text()


@pytest.mark.slow
def test_the_dashboard_is_bound_to_loopback(run: LocalRun) -> None:
    sockets = [one.laddr for process in run.members for one in process.net_connections() if one.status == "LISTEN"]
    assert {address for address, port in sockets if port == run.ports.dashboard} == {"127.0.0.1"}


@pytest.mark.slow
def test_starting_twice_says_where_the_first_one_is(run: LocalRun, root: Path) -> None:
    with pytest.raises(cluster.AlreadyRunningError, match=f"already running: {run.dashboard_url}"):
        cluster.start(root)


@pytest.mark.slow
def test_the_description_names_what_a_person_needs(run: LocalRun, root: Path) -> None:
    document = json.loads(state_path(root).read_text())
    assert document["dashboard_url"] == run.dashboard_url
    assert Path(document["token_path"]) == run.token_path
    assert Path(document["logs"]).is_dir()
    assert {process.pid for process in run.members} >= set(document["pids"][:1])


@pytest.mark.slow
def test_a_taken_port_is_moved_and_stopping_leaves_nothing(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = ports.choose(taken.getsockname()[1])
        assert chosen > taken.getsockname()[1]
    try:
        started = cluster.start(tmp_path)
        members = started.members
        assert len(members) > 3
        assert cluster.stop(tmp_path) >= members
        assert not processes.marked(MARK_NAME, started.mark)
        assert not Path(started.folder).exists()
        assert load(tmp_path) is None
        assert bystander.poll() is None
    finally:
        cluster.stop(tmp_path)
        bystander.kill()
        bystander.wait(10)


@pytest.mark.slow
def test_a_plain_shell_that_evaluates_the_exports_runs_the_literal_line(
    run: LocalRun, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `make demo`: no variable of Ray's, no environment on the path, and another folder."""
    monkeypatch.setattr(cluster, "REPOSITORY", root)
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from infra.local import cluster; from pathlib import Path; "
            f"cluster.REPOSITORY = Path({str(root)!r}); from diagonal.cli import main; main(['env'])",
        ],
        env=os.environ | {"PYTHONPATH": "platform:."},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    script = 'eval "$EXPORTS"; ray job submit -- python jobs/distill.py'
    plain = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"], "EXPORTS": shown}
    done = subprocess.run(["bash", "-c", script], env=plain, cwd="/", capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and f"job in {root}" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_status_is_read_by_scripts(
    run: LocalRun, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "REPOSITORY", root)
    assert cli.main(["status", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dashboard_url"] == run.dashboard_url and document["applications"] == {}


@pytest.mark.parametrize(("verb", "status"), [("down", 0), ("status", 1), ("env", 1), ("serve", 1)])
def test_where_nothing_runs_it_is_said(
    verb: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in verbs.ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster, "REPOSITORY", tmp_path)
    monkeypatch.setattr(cluster.stop, "__defaults__", (tmp_path, False))
    config = ["x", "--config", "serve/config.yaml"] if verb == "serve" else []
    assert cli.main([verb, *config]) == status
    said = capsys.readouterr()
    assert "nothing was running" in said.out if verb == "down" else "`diagonal up`" in said.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--set", "replicas"], "--set = 'replicas': allowed is NAME=VALUE"),
        (["--set", "replicas=0"], "replicas = 0"),
        (["--set", "auth=nobody"], "auth = 'nobody'"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_deployed(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "release", *words]) == cli.REFUSED
    assert line in capsys.readouterr().err


def test_a_process_id_that_was_given_away_is_not_signalled() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        now, earlier = psutil.Process(child.pid), psutil.Process(child.pid)
        earlier._ident = (child.pid, now.create_time() - 1)  # what had the id before
        assert not processes.is_alive(earlier) and not processes.send(earlier, signal.SIGKILL)
        assert child.poll() is None
        assert processes.send(now, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert not processes.send(now, signal.SIGKILL)
    finally:
        child.kill()
        child.wait(10)


def test_a_marked_process_its_children_and_nobody_else_are_found() -> None:
    mark = "DIAGONAL_TEST_MARK"
    sleeper = "print('up', flush=True); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}], env={{}})"
    own = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, mark: "1"}, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", sleeper], env={**os.environ, mark: "12"}, stdout=subprocess.PIPE)
    try:
        assert own.stdout is not None and own.stdout.readline() == b"up\n"
        found = processes.marked(mark, "1")
        assert own.pid in {process.pid for process in found}
        assert len(found) == 2
        assert processes.end(lambda: processes.marked(mark, "1"), grace_s=5) == found
        assert other.poll() is None
    finally:
        own.kill()
        other.kill()
        own.wait(10)
        other.wait(10)


def test_a_process_that_ignores_the_request_is_killed() -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        members = {psutil.Process(child.pid)}
        assert processes.end(lambda: members, grace_s=0.5, kill_s=10) == members
        assert child.wait(10) == -signal.SIGKILL
    finally:
        child.kill()


def test_one_stop_at_a_time(tmp_path: Path) -> None:
    with cluster._exclusive(tmp_path), pytest.raises(cluster.ClusterError, match="under way"):
        cluster.stop(tmp_path)


def test_two_starts_choose_their_ports_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cluster, "START_S", 0.0)
    monkeypatch.setattr(cluster, "ANSWER_S", 0.3)
    with cluster._ports_reserved(), pytest.raises(cluster.ClusterError, match="still starting"):
        with cluster._ports_reserved():
            pass
    with cluster._ports_reserved():
        pass


def test_a_start_that_lost_its_port_fails_at_once_and_leaves_its_log_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = f"print('{cluster.LOST_PORT} to 127.0.0.1:8265')"
    monkeypatch.setattr(cluster, "_start_command", lambda run, cpus: [sys.executable, "-c", said])
    with pytest.raises(cluster.ClusterError, match="a port was taken") as caught:
        cluster.start(tmp_path)
    kept = Path(str(caught.value).rpartition("logs: ")[2])
    assert cluster.LOST_PORT in (kept / "start.log").read_text()
    assert load(tmp_path) is None


def test_a_temporary_folder_with_a_long_name_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert cluster._short_folder() == "/tmp"


def test_a_description_of_a_dead_run_is_no_obstacle(tmp_path: Path) -> None:
    run = LocalRun(str(tmp_path), str(tmp_path / "diagonal-gone"), "no-such-mark", ports_of_nothing())
    state_path(tmp_path).parent.mkdir()
    run.save()
    assert load(tmp_path) == run
    assert cluster.stop(tmp_path) == set()
    assert load(tmp_path) is None


def ports_of_nothing() -> cluster.Ports:
    return cluster.Ports(*range(1, 10))
