"""What every test gets: an environment set before Ray or torch is imported, and one small Ray cluster on demand."""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import pytest

if TYPE_CHECKING:
    from tests.hub import SmallHub
    from tests.s3 import FaultyProxy, S3Server

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
}
STALE = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_DASHBOARD_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_SESSION_TOKEN",
)

BUSY = {"ray_cluster", "cluster", "chromium"}  # fixtures that take both cores of a small machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        choices=("together", "alone"),
        help="only the tests that may run beside each other, or only those that need the machine for themselves",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the other part (see `make test`)."""
    part = config.getoption("--part")
    if part is not None:
        chosen = [item for item in items if is_alone(item) == (part == "alone")]
        config.hook.pytest_deselected(items=[item for item in items if is_alone(item) != (part == "alone")])
        items[:] = chosen


def is_alone(item: pytest.Item) -> bool:
    """Whether a test needs the machine for itself: it is marked so, or starts Ray or a browser."""
    return item.get_closest_marker("alone") is not None or not BUSY.isdisjoint(getattr(item, "fixturenames", ()))


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module is imported: Ray and OpenMP read it once, at import."""
    os.environ.update(ENVIRONMENT)
    for name in STALE:
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch, where a test imported it, to one thread; two threaded tests on two cores stand still."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT


def need_program(name: str) -> str:
    """The path of a program that a test runs; skips with a reason that CI turns into a failure."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")  # servers, which not every user's PATH leads to
    if path is None:
        pytest.skip(f"needs program: {name}")
    return path


@pytest.fixture(scope="session")
def ffprobe() -> str:
    """The path of ffprobe (package ffmpeg)."""
    return need_program("ffprobe")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium."""
    return need_program("chromium")


def started_patiently(start: Callable[[], T]) -> T:
    """What `start` gives. Ray gives up on a node that needs more than 30 s, as the first one on a busy machine may:
    then the processes of that try are ended, and it is tried again, twice at most."""
    us = psutil.Process()
    before = set(us.children(recursive=True))
    for _ in range(2):
        try:
            return start()
        except Exception:  # Ray raises no other
            for process in set(us.children(recursive=True)) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    return start()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One local Ray with eight logical CPUs, started by the first test that asks; gives its address.

    Tests that use it must leave no actor behind; Serve may be started on it (127.0.0.1, a port of the test's own).
    """
    import ray

    folder = tempfile.mkdtemp(prefix="dt-")
    start = partial(
        ray.init,
        num_cpus=8,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        started_patiently(start)
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3Server]":
    """A real S3 service on loopback, started by the first test that asks."""
    from tests.s3 import serve_s3

    with serve_s3() as server:
        yield server


@pytest.fixture
def bucket(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty bucket, which the AWS_* environment of this test leads to."""
    from tests.s3 import environment

    for name, value in environment(s3_server.url).items():
        monkeypatch.setenv(name, value)
    with s3_server.bucket() as name:
        yield name


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Iterator[SmallHub]":
    """A small hub on loopback, which huggingface_hub's own client asks; its cache is empty and no token is known."""
    from huggingface_hub import constants

    from tests.hub import SmallHub

    server = SmallHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def faulty_s3(bucket: str, s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> "Iterator[FaultyProxy]":
    """A proxy that records requests and fails as told; the environment leads to it, and through it to `bucket`."""
    from tests.s3 import FaultyProxy

    proxy = FaultyProxy(s3_server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture(scope="session")
def parts() -> list[bytes]:
    """Of an MP4 of 16 frames a second: an initialisation segment, a chunk of 9 frames and one of 12."""
    import numpy as np

    from diagonal.media.encode import ChunkEncoder

    encoder = ChunkEncoder(32, 32, 16)
    pixels = [np.full((frames, 32, 32, 3), 99, dtype=np.uint8) for frames in (9, 12)]
    return [encoder.init_segment(), *(encoder.encode_chunk(chunk) for chunk in pixels)]
