"""Fixtures of the service: what `tests.serve.harness` builds, started and stopped."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diagonal.client import client
from serve.api.realtime import RealtimeLimits
from serve.settings import ServeSettings
from tests.serve import postgres
from tests.serve.browser import Browser, Open
from tests.serve.harness import Cluster, FakeEngine, Keyed, Service, Until, deadline, http_client, start


@pytest.fixture(autouse=True)
def no_local_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a demo that runs in this checkout is not the key of a test's service."""
    monkeypatch.setattr(client, "LOCAL_KEY_FILE", "no-demo/local_key")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """One PostgreSQL server for the tests that ask for it; gives a URL."""
    folder = Path(tempfile.mkdtemp(prefix="dpg-"))
    try:
        with postgres.server(folder) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def database_numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, database_numbers: Iterator[int]) -> str:
    """An empty database of each kind that the store supports."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    url: str = request.getfixturevalue("postgres_server")
    return postgres.new_database(url, f"test{next(database_numbers)}")


@pytest.fixture
def settings(tmp_path: Path) -> ServeSettings:
    return ServeSettings(data=str(tmp_path / "data"), gateways=2, reader_start_timeout_s=0.6)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_service(settings: ServeSettings, engine: FakeEngine) -> Iterator[Callable[..., Service]]:
    """Starts a service with other settings or store options than the usual ones."""
    made: list[Service] = []

    def make(
        store: dict[str, float] | None = None, limits: RealtimeLimits | None = None, metrics: Any = None, **changes: Any
    ) -> Service:
        service = Service(replace(settings, **changes), engine, limits, **(store or {}))
        service.metrics = metrics or service.metrics
        made.append(service)
        service.start()
        return service

    yield make
    engine.allow(float("inf"))
    for service in made:
        service.stop()


@pytest.fixture(scope="module")
def idle_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests of a module that make no video: nothing of them stays."""
    service = Service(ServeSettings(data=str(tmp_path_factory.mktemp("idle"))), FakeEngine())
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def idle_http(idle_service: Service) -> Iterator[httpx2.Client]:
    with http_client(idle_service.urls[0]) as client:
        yield client


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture
def http(service: Service) -> Iterator[httpx2.Client]:
    with http_client(service.urls[0]) as client:
        yield client


@pytest.fixture
def other_http(service: Service) -> Iterator[httpx2.Client]:
    """A client of the other gateway."""
    with http_client(service.urls[1]) as client:
        yield client


@pytest.fixture
def open_page(chromium: str, tmp_path: Path) -> Iterator[Open]:
    """Opens the page at an address in a browser of its own."""
    opened: list[Browser] = []

    def go(url: str) -> Browser:
        browser = Browser(chromium, tmp_path / f"profile{len(opened)}")
        browser.start(url)
        opened.append(browser)
        return browser

    yield go
    for browser in opened:
        browser.stop()


@pytest.fixture
def guarded(make_service: Callable[..., Service]) -> Service:
    """A service that asks everybody for a key."""
    return make_service(auth="keys")


@pytest.fixture
def key(guarded: Service) -> Keyed:
    """Makes a key and gives the headers that show it."""

    def make(name: str = "somebody", sessions: int = 0, frames_per_minute: int = 0, account: str = "") -> Any:
        limits = {"sessions": sessions, "frames_per_minute": frames_per_minute}
        text = guarded.store._credentials.create_key(name, **limits, now=time.time(), account=account)
        return {"Authorization": f"Bearer {text}"}

    return make


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(**changes: Any) -> Cluster:
        settings = ServeSettings(data=str(tmp_path / f"data{len(made)}"), gateways=2, replicas=2)
        made.append(Cluster(replace(settings, **changes), FakeEngine()))
        made[-1].start()
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture
def expected(make_cluster: Callable[..., Cluster]) -> bytes:
    """The stream when nothing happens."""
    with http_client(make_cluster(replicas=1).urls[0]) as http:
        return http.get(f"/v1/videos/{start(http, 105)}/stream").content


@pytest.fixture
def until() -> Until:
    """`until(condition, what)`: waits for a condition and gives its value; a minute is for a busy machine."""

    def wait(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        with deadline(seconds, what) as tick:
            while not (value := condition()):
                tick()
        return value

    return wait
