"""Proxies with the recipes of `infra/proxies` in front: streams and sockets pass, slow heads do not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.serve.harness import FakeEngine, Service, Until, fragments, http_client, shades, start, status
from tests.serve.proxies import Proxy, haproxy, nginx
from tests.serve.sockets import viewer


@pytest.fixture(params=[nginx, haproxy], ids=lambda one: one.__name__)
def proxy(request: pytest.FixtureRequest, service: Service, tmp_path: Path) -> Iterator[Proxy]:
    with request.param(service.urls[0], tmp_path) as one:
        yield one


def test_the_first_bytes_of_a_stream_pass_before_the_video_is_done(proxy: Proxy, engine: FakeEngine) -> None:
    engine.allow(1)
    data = bytearray()
    with http_client(proxy.url) as http:
        video = start(http)
        with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
            names = fragments(answer.iter_raw(), data)
            assert [next(names) for _ in range(4)] == ["ftyp", "moov", "moof", "mdat"]
            assert status(http, video)["frames_done"] == 9
            engine.allow(100)
            assert list(names) == ["moof", "mdat"] * 6
    assert len(shades(bytes(data))) == 81


def test_a_socket_passes_both_ways(proxy: Proxy, engine: FakeEngine) -> None:
    engine.allow(1)
    with viewer(proxy.url) as one:
        one.start(num_frames=33, extra_params={"pacing": "none"})
        one.read(1)
        one.say("session.interaction", interaction={"event_id": "e", "event": {"prompt": "a blue square"}})
        assert one.until("session.interaction.queued")["event_id"] == "e"
        engine.allow(100)
        assert one.until("session.done")["chunks"] == 3


def test_no_log_of_a_proxy_holds_a_token(proxy: Proxy, http: httpx2.Client, until: Until) -> None:
    made = http.post(f"/v1/videos/{start(http)}/viewers").raise_for_status().json()
    token = made["token"]
    _, public, secret = token.split("_", 2)
    paths = (
        made["watch_path"],
        made["playlist_path"],
        f"v1/shared/{token}",
        f"v1/%73hared/{token.replace('_', '%5F')}//init.mp4",
    )
    with http_client(proxy.url) as one:
        for path in paths:
            one.get(f"/{path}")
    until(lambda: proxy.logged().count(f"vt_{public}_...") == len(paths), "a line of each request")
    assert secret not in proxy.logged()


@pytest.mark.slow
def test_a_request_whose_head_never_ends_is_cut_off_by_the_proxy(proxy: Proxy) -> None:
    address = urlsplit(proxy.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), 5) as slow:
        slow.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        slow.settimeout(20)  # recipes allow ten seconds
        answer = slow.recv(4096)
    assert answer == b"" or b" 408 " in answer
