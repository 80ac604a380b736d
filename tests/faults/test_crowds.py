"""Threats 6, 7 and 16, fault S3 in numbers: crowds of connections that do nothing, that stop reading, that come and go.

The service is the real one over real sockets, around an engine of a few lines.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import uvicorn

from diagonal.metrics import FactoryBackend
from serve.api.realtime import RealtimeLimits
from serve.replica import replica
from serve.settings import ServeSettings
from tests.serve.harness import FakeEngine, Service, deadline, http_client
from tests.serve.hostile import memory_bytes, new_key, start, told
from tests.serve.sockets import viewer
from tests.serve.wire import wire

CHUNK_BYTES = 400_000


@contextmanager
def crowded(
    folder: Path, limits: RealtimeLimits | None = None, metrics: Any = None, **changes: Any
) -> Iterator[Service]:
    """A service with ten places, which asks everybody for a key."""
    engine = FakeEngine()
    engine.config = replace(engine.config, serve=replace(engine.config.serve, max_sessions=10))
    service = Service(replace(ServeSettings(data=str(folder), auth="keys"), **changes), engine, limits)
    service.metrics = metrics or service.metrics
    service.start()
    try:
        yield service
    finally:
        service.stop()


def freed(service: Service, seconds: float) -> None:
    with deadline(seconds, "every slot is free") as tick:
        while service.engine.sessions:
            tick()


def connection(service: Service, sent: bytes) -> socket.socket:
    there = urlsplit(service.urls[0])
    one = socket.create_connection((there.hostname, there.port), 10)
    one.sendall(sent)
    return one


def narrow_socket(service: Service) -> socket.socket:
    """A connection that takes little before it is read."""
    there = urlsplit(service.urls[0])
    assert there.hostname and there.port
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    one.connect((there.hostname, there.port))
    return one


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as large as those of a large picture: what MP4 calls free space is added to each."""
    encode, space = replica._encode_chunk, struct.pack(">I4s", CHUNK_BYTES, b"free") + os.urandom(CHUNK_BYTES - 8)
    monkeypatch.setattr(replica, "_encode_chunk", lambda *arguments: encode(*arguments) + space)


def first_frame_s(http: httpx2.Client, headers: dict[str, str]) -> float:
    """From the request to the first bytes of a chunk, the median of five."""
    took = []
    for _ in range(5):
        began = time.monotonic()
        video = start(http, headers, num_frames=9)
        with http.stream("GET", f"/v1/videos/{video}/stream", headers=headers) as answer:
            next(answer.iter_raw())
        took.append(time.monotonic() - began)
        http.delete(f"/v1/videos/{video}", headers=headers)
    return statistics.median(took)


def test_6_five_hundred_connections_that_say_nothing_whole_delay_nobody(tmp_path: Path) -> None:
    """Half a request line, half a head, half a body, a socket that never starts."""
    with crowded(tmp_path) as service, http_client(service.urls[0]) as http, ExitStack() as stack:
        headers = new_key(service)
        quiet_s = first_frame_s(http, headers)
        head = f"Host: x\r\nAuthorization: {new_key(service)['Authorization']}\r\n"
        body = f"POST /v1/videos HTTP/1.1\r\n{head}Content-Length: 60\r\n\r\n{{".encode()
        halves = [b"GET /v1/mod", b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow:"]
        for number in range(480):
            stack.enter_context(connection(service, halves[number % 2] if number < 330 else body))
        for _ in range(20):
            stack.enter_context(viewer(service.urls[0], new_key(service)))
        assert first_frame_s(http, headers) < 2 * quiet_s + 5


def longest_wait_s(service: Service, headers: dict[str, str], chunks: int) -> float:
    """Between two chunks of a viewer who watches as they come."""
    with viewer(service.urls[0], headers, compression=None) as one:
        one.start(num_frames=12 * chunks - 3)
        came = []
        for _ in range(chunks):
            one.read(1)
            came.append(time.monotonic())
    return max(later - earlier for earlier, later in zip(came, came[1:], strict=False))


def test_7_and_s2_eight_readers_that_stop_reading_cost_little_and_delay_nobody(tmp_path: Path, heavy: None) -> None:
    limits = RealtimeLimits(stall_timeout_s=10.0)
    with crowded(tmp_path, limits, resume_window_s=0.5) as service, ExitStack() as stack:
        headers = new_key(service)
        alone_s = longest_wait_s(service, headers, 8)
        for _ in range(8):
            options: dict[str, Any] = {"max_queue": 1, "close_timeout": 0.5, "compression": None}
            stuck = stack.enter_context(viewer(service.urls[0], headers, sock=narrow_socket(service), **options))
            stuck.start(num_frames=900)
            stuck.read(1)
        before = memory_bytes()
        assert longest_wait_s(service, headers, 16) < 2 * max(alone_s, 0.75) + 5
        assert memory_bytes() - before < 50e6 + 16 * CHUNK_BYTES, "what this test itself has read besides"
        freed(service, 75)


def test_s3_a_pulled_cable_is_noticed_without_credits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers the server's pings (here 5 s, and 5 s to answer): then the session pauses, and ends."""
    pings = partial(uvicorn.Config, ws_ping_interval=5.0, ws_ping_timeout=5.0)
    monkeypatch.setattr(uvicorn, "Config", pings)
    with crowded(tmp_path, resume_window_s=0.5) as service, wire(service.urls[0]) as cable:
        with viewer(cable.url, new_key(service), close_timeout=0.5) as one:
            one.start(num_frames=900)
            one.read(2)
            cable.dead = True
            freed(service, 45)
            assert len(service.engine.made) < 45 / 0.75


def counting(series: set[Any]) -> FactoryBackend:
    """A backend that notes which series there are."""

    class Counted:
        def __init__(self, name: str, *_: Any) -> None:
            self._name = name

        def inc(self, _: float, labels: dict[str, str]) -> None:
            series.add((self._name, tuple(sorted(labels.items()))))

        set = observe = inc

    return FactoryBackend(Counted, Counted, Counted)


def test_16_hundreds_of_sessions_make_no_series_that_the_first_ones_did_not(tmp_path: Path) -> None:
    """Of many keys, prompts and ids, finished, cancelled, refused and wrong."""
    series = set[Any]()
    with crowded(tmp_path, metrics=counting(series)) as service:
        with http_client(service.urls[0]) as http:
            first, headers = set[Any](), new_key(service)
            for number in range(300):
                if number % 20 == 0:
                    headers = new_key(service, f"key {number}")
                video = start(http, headers, num_frames=1, prompt=f"prompt {number}", seed=number)
                if number % 10 == 0:
                    http.get(f"/v1/videos/{video}/stream", headers=headers)
                    http.get(f"/v1/videos/none-{number}", headers=headers)
                    http.post("/v1/videos", json={"prompt": "", f"field-{number}": 1}, headers=headers)
                else:
                    http.delete(f"/v1/videos/{video}", headers=headers)
                if number == 40:
                    first = set(series)
            assert first and series <= first, series - first
            assert told(http, video, headers)
