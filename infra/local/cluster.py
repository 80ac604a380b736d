"""A Ray cluster on this machine alone: started in the repository root, described in .diagonal/run.json, ended by id."""

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from infra.local import processes
from infra.local.run import MARK_NAME, METRIC_PORTS, LocalRun, Ports, get, load, state_path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER_PREFIX = "diagonal-"
# A Unix socket's path holds 107 bytes; Ray appends "/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store".
LONGEST_FOLDER = 107 - 68
LOGICAL_CPUS = 10  # Ray Train's workers, Ray Data and two releases in Serve wait for each other for ever on fewer
OBJECT_STORE_BYTES = 512 * 2**20
ATTEMPTS = 3  # a port that was free may be taken before Ray binds it
START_S = 120.0
PROXY_START_S = 60  # a busy machine takes longer than Serve's own five seconds, which are then three proxies ended
JOB_STOP_WAIT_S = 120  # between SIGTERM and SIGKILL of a stopped job, which saves a checkpoint; Ray's own is 3
ANSWER_S = 120.0
GRACE_S = 5.0  # the GCS and a raylet that lost it do not end on SIGTERM, so a longer wait gains nothing
LOST_PORT = "Failed to bind"  # Ray's own words


class ClusterError(RuntimeError):
    """The local cluster could not be started or stopped; the message says what to do."""


class AlreadyRunningError(ClusterError):
    """A local cluster of this repository is up; `run` describes it."""

    def __init__(self, run: LocalRun) -> None:
        super().__init__(f"already running: {run.dashboard_url} ({run.folder}); `make stop` ends it")
        self.run = run


def start(root: str | Path = REPOSITORY, cpus: int = 0) -> LocalRun:
    """Start a head in `root` and wait until its job API answers.

    `cpus` logical CPUs; 0 takes the machine's own number, and at least LOGICAL_CPUS.
    Raises AlreadyRunningError, or ClusterError with the place of the logs.
    """
    root = Path(root).resolve()
    with _exclusive(root):
        earlier = load(root)
        if earlier is not None:
            if earlier.members:
                raise AlreadyRunningError(earlier)
            _forget(earlier)
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(ClusterError):
                return _attempt(root, cpus)
        return _attempt(root, cpus)


def _attempt(root: Path, cpus: int) -> LocalRun:
    """Start once; what a failed attempt left running is ended, and its logs are kept."""
    with _ports_reserved():
        run = _prepare(root)
        run.save()  # before the first process: an interrupted start can be ended too
        try:
            _launch(run, cpus or max(LOGICAL_CPUS, os.cpu_count() or 1))
        except ClusterError as error:
            processes.end(lambda: run.members, GRACE_S)
            kept = _keep_logs(run)
            _forget(run)
            raise ClusterError(f"{error}; logs: {kept}") from error
        run.save()
        return run


def stop(root: str | Path = REPOSITORY, keep_logs: bool = False) -> set[psutil.Process]:
    """End every process of the run that .diagonal/run.json describes and remove its folder; returns what was ended.

    With `keep_logs` Ray's logs move to .diagonal/logs first.
    """
    root = Path(root).resolve()
    with _exclusive(root):
        run = load(root)
        if run is None:
            return set()
        ended = processes.end(lambda: run.members, GRACE_S)
        if keep_logs:
            _keep_logs(run)
        _forget(run)
        return ended


def with_service(run: LocalRun, service_url: str) -> LocalRun:
    """The same run with the address of the service that was deployed on it, saved."""
    served = replace(run, service_url=service_url)
    served.save()
    return served


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Hold the repository's lock, so that a start and a stop never run at the same time."""
    folder = state_path(root).parent
    folder.mkdir(mode=0o700, exist_ok=True)
    with _locked(folder / "lock", 0.0, "another start or stop of this repository's cluster is under way"):
        yield


@contextlib.contextmanager
def _ports_reserved() -> Iterator[None]:
    """Hold this user's lock while ports are chosen and bound: clusters of two checkouts would choose the same."""
    path = Path(tempfile.gettempdir()) / f"diagonal-ports-{os.getuid()}.lock"
    with _locked(path, START_S + ANSWER_S, "another cluster of this user is still starting"):
        yield


@contextlib.contextmanager
def _locked(path: Path, wait_s: float, otherwise: str) -> Iterator[None]:
    deadline = time.monotonic() + wait_s
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ClusterError(otherwise) from None
                time.sleep(0.2)
        yield


def _prepare(root: Path) -> LocalRun:
    """A fresh private folder with a fresh token in it, and free ports."""
    folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_short_folder())
    run = LocalRun(str(root), folder, secrets.token_hex(16), Ports.choose())
    with open(os.open(run.token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return run


def _short_folder() -> str:
    """A temporary folder whose name leaves room for Ray's socket paths."""
    room = LONGEST_FOLDER - len(f"/{FOLDER_PREFIX}12345678/r")
    for folder in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(folder)) <= room and os.access(folder, os.W_OK):
            return folder
    raise ClusterError(f"the temporary folder {tempfile.gettempdir()!r} is longer than {room} bytes; set TMPDIR")


def _launch(run: LocalRun, cpus: int) -> None:
    """Run `ray start` and wait for the job API; ClusterError when either fails."""
    log = Path(run.folder) / "start.log"
    with open(log, "w") as output:
        try:
            subprocess.run(
                _start_command(run, cpus),
                cwd=run.root,
                env=member_environment(run),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=START_S,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"ray start failed: {error}") from error
    if LOST_PORT in log.read_text():  # Ray goes on without its dashboard
        raise ClusterError("a port was taken while Ray started")
    _wait_for_answer(run)


def member_environment(run: LocalRun) -> dict[str, str]:
    """The variables of every process that belongs to the run, its mark among them, for `ray start`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | run.environment() | {MARK_NAME: run.mark}
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = str(JOB_STOP_WAIT_S)
    environment["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = str(PROXY_START_S)
    environment |= {variable: str(getattr(run.ports, name)) for name, variable in METRIC_PORTS.items()}
    del environment["RAY_ADDRESS"], environment["RAY_API_SERVER_ADDRESS"]  # nothing may answer there yet
    return environment


def _start_command(run: LocalRun, cpus: int) -> list[str]:
    options = {
        "port": run.ports.gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": run.ports.dashboard,
        "dashboard-agent-listen-port": run.ports.agent,
        "metrics-export-port": run.ports.metrics,
        "ray-client-server-port": run.ports.client,
        "min-worker-port": run.ports.first_worker,
        "max-worker-port": run.ports.last_worker,
        "num-cpus": cpus,
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": run.ray_folder,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats", *flags]


def _wait_for_answer(run: LocalRun) -> None:
    deadline = time.monotonic() + ANSWER_S
    while not answers(run):
        if time.monotonic() > deadline:
            raise ClusterError(f"{run.dashboard_url} and its job agent gave no answer in {ANSWER_S:g} s")
        time.sleep(0.2)


def answers(run: LocalRun) -> bool:
    """Whether the job API of `run` accepts the run's token, and the agent that starts its jobs is up."""
    agent = f"http://127.0.0.1:{run.ports.agent}/api/local_raylet_healthz"
    return all(get(url, run.token_path.read_text()) is not None for url in (agent, f"{run.dashboard_url}/api/jobs/"))


def kept_logs(run: LocalRun) -> Path:
    """Where the logs of an ended run lie, if they were kept."""
    return state_path(run.root).parent / "logs" / Path(run.folder).name


def _keep_logs(run: LocalRun) -> Path:
    """Copy Ray's logs and the output of `ray start`, because the run's folder goes."""
    kept = kept_logs(run)
    kept.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(Path(run.folder) / "start.log", kept)
    if run.logs.is_dir():
        shutil.copytree(run.logs, kept / "ray", dirs_exist_ok=True)
    return kept


def _forget(run: LocalRun) -> None:
    """Remove the folder and the description of a run that has ended."""
    folder = Path(run.folder)
    if folder.name.startswith(FOLDER_PREFIX) and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    state_path(run.root).unlink(missing_ok=True)
