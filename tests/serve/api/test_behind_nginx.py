"""nginx with the recipe of `infra/proxies` in front: many viewers of a shared stream cost the service what few do."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.harness import Service, Until, http_client, start, status
from tests.serve.hls_players import HlsPlayer, play
from tests.serve.proxies import Proxy, nginx

CHUNKS = 6


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service(gateways=1, reader_start_timeout_s=20.0)


@pytest.fixture
def proxy(service: Service, tmp_path: Path) -> Iterator[Proxy]:
    with nginx(service.urls[0], tmp_path) as one:
        yield one


@pytest.fixture
def stream(http: httpx2.Client) -> str:
    """A stream that is made as long as somebody watches."""
    body = {"prompt": "a red circle", "extra": {"endless": True}}
    return str(http.post("/v1/videos", json=body).raise_for_status().json()["id"])


def link(http: httpx2.Client, video: str) -> dict[str, Any]:
    return dict(http.post(f"/v1/videos/{video}/viewers").raise_for_status().json())


def asked(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """How often the service itself was asked below a link, by what for; and forget it."""
    lines = [json.loads(line.removeprefix("request ")) for line in caplog.messages if line.startswith("request {")]
    caplog.clear()
    routes = [str(line["route"]).removeprefix("/v1/shared/{token}") for line in lines if line["viewer"]]
    return Counter(routes)


def assert_whole(players: list[HlsPlayer], http: httpx2.Client, video: str) -> None:
    """Everybody got every chunk from his first one on, the bytes that the service has of it."""
    for player in players:
        assert len(player.chunks) == CHUNKS and max(player.chunks) - min(player.chunks) == CHUNKS - 1
    for chunk in sorted({chunk for player in players for chunk in player.chunks}):
        own = http.get(f"/v1/videos/{video}/chunks/{chunk}.m4s").raise_for_status().content
        assert {player.chunks[chunk] for player in players if chunk in player.chunks} == {own}


@pytest.mark.slow
def test_a_hundred_players_of_a_live_stream_cost_the_service_what_five_do(
    proxy: Proxy, http: httpx2.Client, stream: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ray.serve")
    counts = []
    for players in (5, 100):
        address = f"{proxy.url}/{link(http, stream)['playlist_path']}"  # one that no cache knows
        played = asyncio.run(play(address, players, CHUNKS))
        counts.append(asked(caplog))
        assert_whole(played, http, stream)
    few, many = counts
    chunks, playlists = "/chunks/{chunk}.m4s", "/index.m3u8"
    assert many[chunks] <= CHUNKS + 2, "each chunk once, for all who came within half a second"
    assert many[playlists] <= CHUNKS + 4 and many["/init.mp4"] <= 1
    assert many.total() <= few.total() + 6


def test_what_is_finished_is_asked_for_once(
    proxy: Proxy, http: httpx2.Client, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ray.serve")
    video = start(http)
    until(lambda: status(http, video)["status"] == "completed", "completed")
    token = link(http, video)["token"]
    file = http.get(f"/v1/videos/{video}/content").content
    with http_client(proxy.url) as viewer:
        for _ in range(3):
            for path in ("index.m3u8", "init.mp4", "chunks/0.m4s", "content"):
                assert viewer.get(f"/v1/shared/{token}/{path}").status_code == 200
        part = viewer.get(f"/v1/shared/{token}/content", headers={"Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, file[100:200])
        assert set(asked(caplog).values()) == {1}
        found: Counter[str] = Counter()
        for _ in range(2):
            assert viewer.get(f"/v1/shared/{token}/chunks/99.m4s").status_code == 404

        def asked_twice() -> bool:  # a line is logged a moment after its answer
            found.update(asked(caplog))
            return found["/chunks/{chunk}.m4s"] == 2

        until(asked_twice, "what is not there may be there next time")
