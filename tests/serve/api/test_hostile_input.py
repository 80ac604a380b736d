"""Threats 1, 3, 5 and 10 over real sockets: every door, every id, and input of every wrong kind."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from websockets.exceptions import InvalidStatus

from serve.api.auth import PUBLIC, PUBLIC_FOLDERS, SHARED_FOLDER
from serve.api.routes import create_app
from serve.settings import ServeSettings
from tests.serve.harness import FakeEngine, Service, Until, http_client
from tests.serve.hostile import memory_bytes, new_key, start
from tests.serve.sockets import closed, viewer

JSON = {"Content-Type": "application/json"}
HALF = b'"\\ud800"'  # half of a surrogate pair: JSON that no text can hold


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that asks everybody for a key; no test leaves anything in it."""
    service = Service(ServeSettings(data=str(tmp_path_factory.mktemp("guarded")), auth="keys"), FakeEngine())
    service.engine.allow(0)
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def door(guarded: Service) -> Iterator[httpx2.Client]:
    with http_client(guarded.urls[0]) as client:
        yield client


def doors(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Every way in, of every kind of route that there is; one of a new kind fails here."""
    for route in routes:
        if isinstance(route, Mount):
            assert f"{route.path}/" in PUBLIC_FOLDERS, "a mounted application that nobody looked at"
        elif isinstance(route, WebSocketRoute):
            yield "WS", route.path
        else:
            assert isinstance(route, (APIRoute, Route)), type(route)
            if not route.path.startswith((SHARED_FOLDER, "/watch/")):  # viewers' links, which are threat 19
                yield from ((method, route.path) for method in route.methods or ())


def test_1_every_door_that_there_is_asks_for_a_key_and_takes_no_wrong_one(
    guarded: Service, door: httpx2.Client
) -> None:
    found = sorted(doors(create_app(guarded.gateways[0], guarded.metrics).routes))
    asked = [(method, re.sub(r"{[\w:]+}", "x", path)) for method, path in found if path not in PUBLIC]
    assert len(asked) >= 9 and ("WS", "/v1/realtime/video") in asked
    for headers in ({}, {"Authorization": f"Bearer dk_{'0' * 16}_{'x' * 43}"}):
        for method, path in asked:
            if method == "WS":
                with pytest.raises(InvalidStatus) as caught, viewer(guarded.urls[0], headers):
                    pass
                assert caught.value.response.status_code == 401
            else:
                assert door.request(method, path, json={}, headers=headers).status_code == 401, (method, path)
    assert not guarded.engine.sessions


def test_3_another_keys_video_is_not_there_by_any_door(guarded: Service, door: httpx2.Client, until: Until) -> None:
    """Whatever route takes an id: to another key it says of a video that is there what it says of one that is not."""
    mine, theirs = new_key(guarded), new_key(guarded)
    video, nothing = start(door, mine), "video_" + "0" * 32
    taking = [one for one in doors(create_app(guarded.gateways[0], guarded.metrics).routes) if "{" in one[1]]
    bodies = [{}, {"interaction": {"event": {"prompt": "x"}}}, {"interaction": {"event": {"action": "pause"}}}]
    assert len(taking) >= 5
    for method, path in taking:
        found = set()
        for body in bodies:
            address = path.replace("{chunk}", "0").replace("{viewer_id}", "x")
            answers = [
                door.request(method, address.format(video_id=one), json=body, headers=theirs)
                for one in (video, nothing)
            ]
            codes = [(one.status_code, one.text and one.json()["error"]["code"]) for one in answers]
            assert codes[0] == codes[1] and codes[0][0] in (404, 422), (method, path)
            found.add(codes[0][0])
        assert 404 in found, "with a right body it is not there"
    assert door.get(f"/v1/videos/{video}", headers=mine).json()["status"] == "in_progress"
    door.delete(f"/v1/videos/{video}", headers=mine)
    until(lambda: not guarded.engine.sessions, "the session is gone")


def test_3_a_secret_is_drawn_anew_in_all_of_its_256_bits(guarded: Service, door: httpx2.Client) -> None:
    headers = new_key(guarded)
    made = [door.post("/v1/realtime/client_secrets", headers=headers).json()["value"] for _ in range(20)]
    drawn = [one.split("_", 2)[2] for one in made]
    assert len(set(drawn)) == 20 and min(map(len, drawn)) * 6 >= 256
    assert all(len(set(letters)) > 1 for letters in zip(*drawn, strict=True)), "no letter stands still"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": ' + HALF + b"}",
        b'{"prompt": "x", ' + HALF + b": 1}",
        b'{"prompt": "x", "model": ' + HALF + b"}",
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "seconds": 1e400}',
        b'{"prompt": "x", "seconds": NaN}',
        b'{"prompt": "x", "seconds": "inf"}',
        b'{"prompt": "x", "seconds": -0.0}',
        b'{"prompt": "x", "num_frames": 0}',
        b'{"prompt": "x", "num_frames": 1e3}',
        b'{"prompt": "x", "num_frames": 9223372036854775808}',
        b'{"prompt": "x", "seed": -1}',
        b'{"prompt": "x", "seed": 4294967296}',
        b'{"prompt": "x", "seed": true}',
        b'{"prompt": null}',
        b"[]",
        b'"x"',
        b"",
        b"[" * 60_000,
        b'{"a":' * 9000 + b"1" + b"}" * 9000,
        b'{"prompt": "x", "extra": "' + b"[" * 60_000 + b'"}',
        b'{"prompt": "x", "extra": {"pacing": "fast"}}',
        b'{"prompt": "x", "width": ' + b"9" * 400 + b', "height": 1}',
        b'{"prompt": "x", "size": "0x0"}',
        b'{"prompt": "x", "size": "256X256"}',
        b'{"prompt": "x", "fps": 0}',
        b'{"prompt": "' + b"x" * 201 + b'"}',
        b'{"prompt": " \\t\\n "}',
    ],
)
def test_5_a_body_that_is_wrong_is_a_problem_of_the_caller_and_makes_nothing(
    guarded: Service, door: httpx2.Client, body: bytes
) -> None:
    answer = door.post("/v1/videos", content=body, headers=new_key(guarded) | JSON)
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json" and answer.json()["error"]["code"]
    assert not guarded.engine.sessions


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/videos/%00", 404),
        ("GET", "/v1/videos/%ed%a0%80", 404),
        ("DELETE", "/v1/videos/a%00b", 404),
        ("GET", "/v1/videos/%00/stream", 404),
        ("GET", "/v1/videos?limit=" + "9" * 5000, 422),
        ("GET", "/v1/videos?limit=0", 422),
        ("GET", "/v1/videos?limit=101", 422),
        ("GET", "/v1/videos?order=%ff", 422),
        ("GET", "/v1/videos/x/stream?start_chunk=-1", 422),
        ("GET", "/v1/videos/x/stream?start_chunk=2147483648", 422),
        ("GET", "/v1/videos/" + "x" * 5000, 404),
        ("POST", "/v1/videos/x/interactions", 400),
    ],
)
def test_5_an_address_that_is_wrong_is_told_so(
    guarded: Service, door: httpx2.Client, method: str, path: str, status: int
) -> None:
    answer = door.request(method, path, headers=new_key(guarded))
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


@pytest.mark.parametrize("headers", [{"Host": "[::1"}, {"Host": ""}, {"Host": "a b"}, {"Host": "localhost@evil"}])
def test_1_a_host_that_is_none_is_not_this_machine(idle_service: Service, headers: dict[str, str]) -> None:
    assert httpx2.get(f"{idle_service.urls[0]}/v1/models", headers=headers).status_code in (400, 403)


@pytest.mark.parametrize("origin", ["http://[::1", "null", "", "http://", "//", "http://127.0.0.1.evil.example"])
def test_2_an_origin_that_is_none_is_a_foreign_one(idle_service: Service, origin: str) -> None:
    body = {"prompt": "x"}
    answer = httpx2.post(f"{idle_service.urls[0]}/v1/videos", json=body, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")


def test_5_bodies_of_ten_megabytes_are_refused_and_leave_no_memory_behind(guarded: Service) -> None:
    there = urlsplit(guarded.urls[0])
    headers = f"Host: x\r\nAuthorization: {new_key(guarded)['Authorization']}\r\nContent-Type: application/json\r\n"
    part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    before = memory_bytes()
    for _ in range(10):
        with socket.create_connection((there.hostname, there.port), 10) as connection:
            connection.sendall(f"POST /v1/videos HTTP/1.1\r\n{headers}Transfer-Encoding: chunked\r\n\r\n".encode())
            try:
                for _ in range(160):
                    connection.sendall(part)
                answer = connection.recv(100)
            except ConnectionError:
                continue  # it had seen enough
            assert answer.startswith(b"HTTP/1.1 413")
    assert memory_bytes() - before < 20e6


def test_5_messages_beyond_the_limit_close_the_socket_and_leave_no_memory_behind(guarded: Service) -> None:
    headers, before = new_key(guarded), memory_bytes()
    for size in (128 * 1024 + 1, 1_000_000, 15_000_000, 20_000_000):
        with viewer(guarded.urls[0], headers) as one:
            try:
                one.socket.send('{"type": "session.start", "prompt": "' + "x" * size + '"}')
            except ConnectionError:
                continue
            assert closed(one)[0] in (1009, 1006)
    assert memory_bytes() - before < 80e6, "less than was sent"


def test_5_a_start_of_half_a_character_is_told_over_the_socket(guarded: Service) -> None:
    with viewer(guarded.urls[0], new_key(guarded)) as one:
        one.socket.send('{"type": "session.start", "prompt": ' + HALF.decode() + "}")
        assert (closed(one)[0], one.others[-1]["code"]) == (1008, "invalid_json")


@pytest.mark.parametrize("size", [200, 201])
def test_5_the_limits_are_where_they_are_published(
    guarded: Service, door: httpx2.Client, size: int, until: Until
) -> None:
    headers = new_key(guarded)
    limits = door.get("/v1/models", headers=headers).json()["data"][0]["limits"]
    assert (limits["max_prompt_characters"], limits["max_frames"]) == (200, 960)
    for body in ({"prompt": "é" * size}, {"prompt": "x", "num_frames": 760 + size}):
        answer = door.post("/v1/videos", json=body, headers=headers)
        assert answer.status_code == (200 if size == 200 else 422 if "num_frames" not in body else 400)
        if size == 200:
            door.delete(f"/v1/videos/{answer.json()['id']}", headers=headers)
            until(lambda: not guarded.engine.sessions, "the session is gone")


@pytest.mark.parametrize("where", ["extra", "interaction", "session.start", "form"])
def test_10_no_address_is_fetched_from_any_body(guarded: Service, door: httpx2.Client, where: str) -> None:
    headers = new_key(guarded)
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        for address in (url, "file:///etc/passwd", "s3://other/x", "http://169.254.169.254/latest/meta-data"):
            if where == "session.start":
                with viewer(guarded.urls[0], headers) as one:
                    one.say("session.start", prompt="x", image_reference={"image_url": address})
                    assert closed(one)[1]["code"] == "unsupported_field"
                continue
            asks: dict[str, dict[str, Any]] = {
                "extra": {"json": {"prompt": "x", "extra": {"image_url": address}}},
                "interaction": {"json": {"interaction": {"event": {"prompt": "x", "image_url": address}}}},
                "form": {"data": {"prompt": "x", "input_reference": address}},
            }
            path = "/v1/videos/video_x/interactions" if where == "interaction" else "/v1/videos"
            answer = door.post(path, headers=headers, **asks[where])
            code = "unsupported_field" if where == "form" else "unknown_field"
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
        with pytest.raises(TimeoutError):
            trap.accept()
    assert not guarded.engine.sessions


def test_10_an_uploaded_file_is_not_taken_and_not_shown(guarded: Service, door: httpx2.Client) -> None:
    files = {"input_reference": ("x.png", b"\x89PNG SECRET_X", "image/png")}
    answer = door.post("/v1/videos", data={"prompt": "x"}, files=files, headers=new_key(guarded))
    assert answer.status_code == 422 and "SECRET_X" not in answer.text
    answer = door.post("/v1/videos", files={"prompt": ("p.txt", b"SECRET_X")}, headers=new_key(guarded))
    assert answer.status_code == 422 and "SECRET_X" not in answer.text and "UploadFile" not in answer.text
