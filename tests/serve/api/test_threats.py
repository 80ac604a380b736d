"""Threats against the running application, over real sockets: who comes in, what he reaches, and what he learns.

Numbers are those of docs/threats.md. Threats 4 (caches of two sessions), 9 and 12 (releases),
13 (ports of Ray) and 18 (dependencies) are held by the tests of the engine, of releases and of the deployment.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from diagonal.errors import FieldError
from serve.api.auth import PUBLIC, PUBLIC_FOLDERS, SHARED_FOLDER
from serve.api.routes import create_app
from serve.settings import ServeSettings
from serve.store.credentials import local_key
from tests.serve.harness import FakeEngine, Keyed, Service, Until, http_client
from tests.serve.sockets import LOCAL_KEY, viewer
from tests.serve.wire import wire


@pytest.fixture
def http(guarded: Service) -> Iterator[httpx2.Client]:
    with http_client(guarded.urls[0]) as client:
        yield client


def start(http: httpx2.Client, headers: dict[str, str], **fields: Any) -> str:
    body = {"prompt": "a red circle", "num_frames": 21} | fields
    return str(http.post("/v1/videos", json=body, headers=headers).raise_for_status().json()["id"])


def refused(url: str, headers: dict[str, str] | None = None, **options: Any) -> int:
    """The status that a WebSocket's upgrade is refused with."""
    with pytest.raises(InvalidStatus) as caught, viewer(url, headers, **options):
        pass
    return caught.value.response.status_code


def address_of(service: Service) -> tuple[str, int]:
    parts = urlsplit(service.urls[0])
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def requests_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Those that ask for a key or are public; viewers' links, which ask for a token, are threat 19."""
    for route in app.routes:
        if isinstance(route, APIRoute) and not route.path.startswith((SHARED_FOLDER, "/watch/")):
            yield from ((method, re.sub(r"{\w+}", "video_x", route.path)) for method in sorted(route.methods or ()))


def test_1_every_route_that_is_not_public_asks_for_a_key(guarded: Service, http: httpx2.Client) -> None:
    app = create_app(guarded.gateways[0], guarded.metrics)
    asked = [(method, path) for method, path in requests_of(app) if path not in PUBLIC]
    assert len(asked) >= 9
    for method, path in [*asked, ("GET", "/nothing"), ("PUT", "/v1/videos"), ("GET", "/docs")]:
        answer = http.request(method, path, json={"prompt": "x"})
        code = "missing_api_key" if method == "HEAD" else answer.json()["error"]["code"]  # a HEAD has no body
        assert (answer.status_code, code) == (401, "missing_api_key"), (method, path)
        assert answer.headers["www-authenticate"] == "Bearer" and "x-request-id" in answer.headers
    assert [route.path for route in app.routes if isinstance(route, WebSocketRoute)] == ["/v1/realtime/video"]
    assert refused(guarded.urls[0]) == 401
    assert not guarded.engine.sessions


def test_1_only_what_tells_nothing_is_public(http: httpx2.Client) -> None:
    assert PUBLIC == {"/", "/health/live", "/health/ready", "/openapi.json"} and PUBLIC_FOLDERS == (
        "/viewer/",
        "/watch/",
    )
    assert {path: http.get(path).status_code for path in sorted(PUBLIC)} == dict.fromkeys(sorted(PUBLIC), 200)
    for path in ("/viewer/../v1/models", "/viewer/%2e%2e/v1/models", "/viewer/..%2f..%2fstore.py", "//v1/models"):
        assert http.get(path).status_code in (401, 404)


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "Bearer",
        "Bearer x",
        "Basic ZGs6eA==",
        "Bearer dk_0000000000000000_x",
        "Bearer ek_0_x",
        "Bearer dk_' OR 1=1 --_x",
    ],
)
def test_1_what_is_not_a_key_does_not_open(guarded: Service, http: httpx2.Client, shown: str) -> None:
    headers = {"Authorization": shown}
    assert http.get("/v1/models", headers=headers).status_code == 401
    assert refused(guarded.urls[0], headers) == 401


def test_1_a_key_opens_until_it_is_revoked(guarded: Service, http: httpx2.Client, key: Keyed) -> None:
    headers = key()
    assert http.get("/v1/models", headers=headers).status_code == 200
    guarded.store._credentials.revoke_key(headers["Authorization"].split("_")[1], time.time())
    answer = http.get("/v1/models", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


def test_1_a_key_in_an_address_is_not_looked_at(guarded: Service, http: httpx2.Client, key: Keyed) -> None:
    text = key()["Authorization"].removeprefix("Bearer ")
    for name in ("key", "api_key", "token", "access_token"):
        assert http.get("/v1/models", params={name: text}).status_code == 401


@pytest.fixture
def local(settings: ServeSettings, engine: FakeEngine) -> Iterator[Service]:
    """A service with `auth: local` whose callers show what they show."""
    service = Service(settings, engine)
    service.shows_key = False
    service.start()
    yield service
    service.stop()


def test_1_this_machines_own_user_shows_the_key_in_his_file(local: Service) -> None:
    url, there = local.urls[0], local.settings.local_key
    assert there.stat().st_mode & 0o777 == 0o600
    told = httpx2.get(f"{url}/v1/models")
    assert (told.status_code, told.json()["error"]["code"]) == (401, "missing_api_key") and "local_key" in told.text
    assert str(there.parent) not in told.text and refused(url, {}) == 401
    with viewer(url, LOCAL_KEY) as one:
        one.start(num_frames=9, extra_params={"pacing": "none"})
        one.until("session.done")
    assert len(httpx2.get(f"{url}/v1/videos", headers=LOCAL_KEY).json()["data"]) == 1
    key = LOCAL_KEY["Authorization"]
    for wrong in ("Bearer dk_local_", "Bearer dk_local_x", key + "x", key.replace("dk_", "ek_")):
        assert httpx2.get(f"{url}/v1/models", headers={"Authorization": wrong}).status_code == 401
    foreign = httpx2.get(f"{url}/v1/models", headers=LOCAL_KEY | {"Host": "videos.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "foreign_host")


@pytest.mark.parametrize("host", ["videos.example", "localhost", "127.0.0.1", "[::1]", "", None])
def test_1_whom_a_silent_proxy_passes_on_shows_a_key_whatever_host_he_names(local: Service, host: str | None) -> None:
    """As nginx and haproxy are by default: the service sees a caller on this machine, and no header tells more."""
    with wire(local.urls[0]) as proxy:
        there = {} if host is None else {"Host": host}
        for method, path in (("GET", "/v1/models"), ("GET", "/v1/videos"), ("DELETE", "/v1/videos/video_x")):
            assert httpx2.request(method, f"{proxy.url}{path}", headers=there).status_code in (400, 401)
        answer = httpx2.post(f"{proxy.url}/v1/videos", headers=there, json={"prompt": "a red circle"})
        assert answer.status_code in (400, 401) and not local.engine.sessions
        assert refused(proxy.url, {}) == 401


def test_1_the_local_key_is_made_once_and_opens_nothing_else(tmp_path: Path, key: Keyed, http: httpx2.Client) -> None:
    made = local_key(tmp_path / "local_key")
    text = (tmp_path / "local_key").read_text()
    assert text.startswith("dk_local_") and len(text) > 40 and local_key(tmp_path / "local_key") == made
    assert http.get("/v1/models", headers=LOCAL_KEY).status_code == 401  # with auth: keys
    for spoil in (lambda path: path.chmod(0o644), lambda path: path.write_text("dk_0_x")):
        (tmp_path / "local_key").unlink()
        local_key(tmp_path / "local_key")
        spoil(tmp_path / "local_key")
        with pytest.raises(FieldError, match="local_key"):
            local_key(tmp_path / "local_key")


@pytest.mark.parametrize("prefix", ["/diagonal", "/viewer", "/v1", "/health/live"])
def test_1_below_a_prefix_the_same_is_public_and_nothing_else(guarded: Service, key: Keyed, prefix: str) -> None:
    app = create_app(guarded.gateways[0], guarded.metrics)

    async def below(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": prefix}, receive, send)  # as Serve's proxy says of a route prefix

    async def status(method: str, path: str, headers: dict[str, str]) -> int:
        transport = httpx2.ASGITransport(below, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.request(method, prefix + path, headers=headers)).status_code

    def ask(method: str, path: str, headers: dict[str, str] | None = None) -> int:
        return int(guarded.run(status(method, path, headers or {})))

    assert [ask("GET", path) for path in ("/", "/health/live", "/openapi.json", "/viewer/viewer.js")] == [200] * 4
    for method, path in requests_of(app):
        if path not in PUBLIC:
            assert ask(method, path) == 401, (method, path)
    assert ask("GET", "/v1/models", key()) == 200


def test_1_a_request_that_nobody_was_put_into_is_refused(guarded: Service) -> None:
    """Were a route taken for a public one by mistake, it would still be 401."""
    app = create_app(guarded.gateways[0], guarded.metrics)
    app.user_middleware.clear()

    async def status() -> int:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return (await client.get("/v1/models")).status_code

    assert guarded.run(status()) == 401


def test_2_a_client_secret_opens_one_session(guarded: Service, http: httpx2.Client, key: Keyed, until: Until) -> None:
    headers = key()
    made = http.post("/v1/realtime/client_secrets", headers=headers).raise_for_status().json()
    assert 0 < made["expires_at"] - time.time() <= 61
    protocols = [Subprotocol("realtime"), Subprotocol(f"diagonal-client-secret.{made['value']}")]
    with viewer(guarded.urls[1], subprotocols=protocols) as one:
        assert one.socket.subprotocol == "realtime"  # the secret is not sent back
        one.start(num_frames=9, extra_params={"pacing": "none"})
        one.until("session.done")
        video = one.request_id
    assert refused(guarded.urls[0], subprotocols=protocols) == 401
    assert http.get(f"/v1/videos/{video}", headers=headers).status_code == 200
    assert http.get(f"/v1/videos/{video}", headers=key("another")).status_code == 404


@pytest.mark.slow
def test_2_a_client_secret_opens_nothing_else_and_not_for_long(
    guarded: Service, http: httpx2.Client, key: Keyed
) -> None:
    headers = key()
    body = {"expires_after": {"seconds": 1}}
    value = http.post("/v1/realtime/client_secrets", headers=headers, json=body).json()["value"]
    assert http.get("/v1/videos", headers={"Authorization": f"Bearer {value}"}).status_code == 401
    time.sleep(1.2)
    assert refused(guarded.urls[0], {"Authorization": f"Bearer {value}"}) == 401
    long = http.post("/v1/realtime/client_secrets", headers=headers, json={"expires_after": {"seconds": 61}})
    assert (long.status_code, long.json()["error"]["param"]) == (422, "expires_after.seconds")


def test_2_a_page_of_another_origin_opens_no_socket(
    make_service: Callable[..., Service], idle_service: Service
) -> None:
    assert refused(idle_service.urls[0], {"Origin": "http://evil.example"}) == 403
    assert refused(idle_service.urls[0], {"Origin": "null"}) == 403
    with viewer(idle_service.urls[0], {"Origin": idle_service.urls[0]}):
        pass
    service = make_service(origins="https://page.example")
    with viewer(service.urls[0], {"Origin": "https://page.example"}):
        pass


@pytest.mark.slow
def test_3_another_keys_video_is_not_there(http: httpx2.Client, key: Keyed, engine: FakeEngine) -> None:
    engine.allow(1)
    mine, theirs = key("me"), key("they")
    video = start(http, mine)
    paths = [("GET", ""), ("GET", "/content"), ("GET", "/stream"), ("DELETE", ""), ("POST", "/interactions")]
    body = {"interaction": {"event": {"prompt": "x"}}}
    for method, path in paths:
        answer = http.request(method, f"/v1/videos/{video}{path}", json=body, headers=theirs)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found"), (method, path)
    assert http.get("/v1/videos", headers=theirs).json()["data"] == []
    assert http.get("/v1/videos", params={"after": video, "order": "asc"}, headers=theirs).json()["data"] == []
    assert http.get(f"/v1/videos/{video}", headers=mine).status_code == 200 and engine.sessions


def test_3_a_resume_token_is_of_no_use_to_another_key(guarded: Service, key: Keyed, engine: FakeEngine) -> None:
    engine.allow(1)
    with viewer(guarded.urls[0], key("me")) as one, viewer(guarded.urls[0], key("they")) as other:
        one.start(num_frames=81)
        one.read(1)
        other.say("session.start", resume_token=one.resume_token)
        assert other.next()["code"] == "session_not_found"
        one.say("session.ping")
        assert one.next() == {"type": "session.pong"}


def test_3_ids_cannot_be_guessed(http: httpx2.Client, key: Keyed, engine: FakeEngine) -> None:
    engine.allow(0)
    headers = key()
    ids = [start(http, headers) for _ in range(2)]
    assert all(re.fullmatch(r"video_[0-9a-f]{32}", one) for one in ids) and len(set(ids)) == 2


def test_5_a_body_that_is_too_large_is_refused_before_it_is_read(guarded: Service, key: Keyed) -> None:
    address = address_of(guarded)
    head = f"POST /v1/videos HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nAuthorization: {key()['Authorization']}\r\n"
    with socket.create_connection(address, 10) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 10000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(address, 10) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(9):
            connection.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_6_half_open_requests_hold_up_nobody(guarded: Service, http: httpx2.Client, key: Keyed) -> None:
    address = address_of(guarded)
    headers = key()
    with ExitStack() as stack:
        for number in range(300):
            one = stack.enter_context(socket.create_connection(address, 10))
            one.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"[: 20 + number % 30])
        video = start(http, headers)
        with http.stream("GET", f"/v1/videos/{video}/stream", headers=headers) as answer:
            assert next(answer.iter_raw())


@pytest.mark.slow
def test_7_a_reader_that_does_not_read_costs_little(guarded: Service, key: Keyed, engine: FakeEngine) -> None:
    psutil = pytest.importorskip("psutil")
    headers = key()
    with ExitStack() as stack:
        stuck = stack.enter_context(viewer(guarded.urls[0], headers, max_queue=1))
        stuck.start(num_frames=900, streaming_buffer_seconds=1.0)
        stuck.read(1)
        before = psutil.Process().memory_info().rss
        quick = stack.enter_context(viewer(guarded.urls[0], headers))
        quick.start(num_frames=480, extra_params={"pacing": "none"})
        quick.until("session.done")
        assert sum(video == stuck.request_id for video, _ in engine.made) <= 2
        assert psutil.Process().memory_info().rss - before < 50e6


def test_8_a_key_runs_as_many_sessions_as_it_may(
    guarded: Service, http: httpx2.Client, key: Keyed, engine: FakeEngine, until: Until
) -> None:
    engine.allow(0)
    headers = key(sessions=1)
    video = start(http, headers)
    answer = http.post("/v1/videos", json={"prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "session_quota_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    with viewer(guarded.urls[0], headers) as one:
        one.say("session.start", prompt="x")
        assert one.next()["code"] == "session_quota_exceeded"
    http.delete(f"/v1/videos/{video}", headers=headers)
    until(lambda: not engine.sessions, "the session is gone")
    start(http, headers)
    limits = http.get("/v1/models", headers=headers).json()["data"][0]["limits"]
    assert (limits["max_sessions"], limits["max_frames_per_minute"]) == (1, None)


def test_8_what_a_full_server_refuses_counts_in_no_quota(http: httpx2.Client, key: Keyed, engine: FakeEngine) -> None:
    engine.allow(0)
    filler, headers = key(), key(sessions=1, frames_per_minute=30)
    videos = [start(http, filler) for _ in range(2)]
    for _ in range(3):
        answer = http.post("/v1/videos", json={"prompt": "x", "num_frames": 21}, headers=headers)
        assert answer.json()["error"]["code"] == "server_full"
    http.delete(f"/v1/videos/{videos[0]}", headers=filler)
    time.sleep(0.1)
    start(http, headers)


def test_9_names_are_looked_up_never_opened(http: httpx2.Client, key: Keyed) -> None:
    headers = key()
    for name in ("../../etc/passwd", "/etc/passwd", "%2e%2e%2f", "s3://bucket/x", "a\x00b", "x" * 300):
        answer = http.post("/v1/videos", json={"prompt": "x", "model": name}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "%00", "video_%2e%2e"):
        assert http.get(f"/v1/videos/{name}/content", headers=headers).status_code == 404


@pytest.mark.parametrize("field", ["input_reference", "image_reference", "image_url", "release", "lora"])
def test_10_no_address_is_ever_fetched(http: httpx2.Client, key: Keyed, field: str) -> None:
    refusals = (422, "unknown_field"), (422, "unsupported_field")  # the latter: what other services have
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        for address in (url, "http://169.254.169.254/", "file:///etc/passwd", "s3://other/x"):
            answer = http.post("/v1/videos", json={"prompt": "x", field: address}, headers=key())
            assert (answer.status_code, answer.json()["error"]["code"]) in refusals
        with pytest.raises(TimeoutError):
            trap.accept()


def test_11_and_14_neither_prompts_nor_keys_are_in_logs_metrics_or_files(
    guarded: Service,
    http: httpx2.Client,
    key: Keyed,
    engine: FakeEngine,
    until: Until,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG", logger="ray.serve")
    headers = key()
    secret = headers["Authorization"].split("_", 2)[2]
    canary = "CANARY\n\x1b[31m level=ERROR"
    video = start(http, headers, prompt=canary)
    until(lambda: http.get(f"/v1/videos/{video}", headers=headers).json()["status"] == "completed", "completed")
    http.post("/v1/videos", json={"prompt": canary * 50}, headers=headers | {"X-Request-Id": "ok-1"})
    http.post("/v1/videos", json={"prompt": 5, canary: canary}, headers=headers)
    http.get(f"/v1/videos/CANARY{secret}", headers=headers)
    engine.fail_at = 1
    with viewer(guarded.urls[0], headers) as one:
        one.start(prompt=canary, num_frames=81)
        with pytest.raises(ConnectionClosed):
            while True:
                one.next()
    client = http.post("/v1/realtime/client_secrets", headers=headers).json()["value"]
    told = caplog.text + "".join(capfd.readouterr()) + str(guarded.metrics.records)
    for canary in ("CANARY", secret, client, one.resume_token):
        assert canary not in told
    assert "ok-1" in told and headers["Authorization"].split("_")[1] in told  # what may be there is
    files = [path for path in Path(guarded.settings.data).rglob("*") if path.is_file()]
    assert files and not any(secret.encode() in path.read_bytes() for path in files)
    requests = [line for line in caplog.messages if line.startswith("request {")]
    assert requests and all("\n" not in line and json.loads(line.removeprefix("request ")) for line in requests)


def test_11_a_request_id_is_kept_where_it_is_decent(http: httpx2.Client) -> None:
    assert http.get("/health/live", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for wrong in ("x" * 129, "a b", "a\tb"):
        given = http.get("/health/live", headers={"X-Request-Id": wrong}).headers.get_list("x-request-id")
        assert len(given) == 1 and re.fullmatch(r"[0-9a-f]{32}", given[0])
    problem = http.get("/v1/models", headers={"X-Request-Id": "abc-2"}).json()
    assert problem["request_id"] == "abc-2"


def test_15_what_breaks_inside_is_told_to_nobody(
    guarded: Service, http: httpx2.Client, key: Keyed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("SECRET_X")

    monkeypatch.setattr(guarded.gateways[0], "get", broken)
    caplog.set_level("DEBUG", logger="ray.serve")
    answer = http.get("/v1/videos/video_x", headers=key() | {"X-Request-Id": "r1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers.get_list("x-request-id") == ["r1"] and answer.json()["request_id"] == "r1"
    assert "SECRET_X" not in answer.text + caplog.text and "r1" in caplog.text


@pytest.mark.slow
def test_16_no_label_of_a_metric_is_the_callers_to_choose(guarded: Service, http: httpx2.Client, key: Keyed) -> None:
    headers = key()
    for number in range(50):
        http.post("/v1/videos", json={"prompt": "x", f"field{number}": 1}, headers=headers)
        http.get(f"/v1/videos/video_{number}", headers=headers)
    series = {(record.name, tuple(sorted(record.labels.items()))) for record in guarded.metrics.records}
    assert len({one for one in series if one[0] == "diagonal_errors_total"}) == 2


def test_17_many_keys_of_one_account_share_its_frames(http: httpx2.Client, key: Keyed) -> None:
    keys = [key(f"key{number}", frames_per_minute=50, account="one-account") for number in range(4)]
    answers = [http.post("/v1/videos", json={"prompt": "x", "num_frames": 21}, headers=one) for one in keys]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert answers[-1].json()["error"]["code"] == "frame_quota_exceeded"
    large = http.post("/v1/videos", json={"prompt": "x", "num_frames": 51}, headers=keys[0])
    assert (large.status_code, large.json()["error"]["code"]) == (403, "quota_too_small")
