"""What pages of other origins, caches, monitors and proxies get: CORS, HEAD, Allow, headers of live answers."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from serve.settings import ServeSettings
from tests.serve.harness import FakeEngine, Service, Until, http_client, start, status
from tests.serve.hostile import new_key

PAGE, OTHER = "http://127.0.0.1:5173", "http://127.0.0.1:5174"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
MONITORED = ["/health/ready", "/health/live", "/", "/v1/models", "/v1/videos", "/openapi.json", "/viewer/viewer.js"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data, origins = str(tmp_path_factory.mktemp("pages")), f"{PAGE}, https://a.example"
    one = Service(ServeSettings(data=data, auth="keys", origins=origins, reader_start_timeout_s=0.6), FakeEngine())
    one.start()
    yield one
    one.stop()


@pytest.fixture
def http(service: Service) -> Iterator[httpx2.Client]:
    with http_client(service.urls[0], new_key(service)) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/models", "/v1/realtime/client_secrets", "/v1/videos/x/stream"])
def test_a_listed_page_asks_first_without_a_key(service: Service, path: str) -> None:
    answer = httpx2.options(f"{service.urls[0]}{path}", headers={**PREFLIGHT, "Origin": PAGE})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert {"GET", "HEAD", "POST", "DELETE"} <= set(answer.headers["access-control-allow-methods"].split(", "))
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    refused = httpx2.options(f"{service.urls[0]}{path}", headers={**PREFLIGHT, "Origin": OTHER})
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


def test_a_listed_page_may_read_every_answer_and_its_headers(service: Service, http: httpx2.Client) -> None:
    answers = [
        http.get("/v1/models", headers={"Origin": PAGE}),
        http.get("/v1/videos/none", headers={"Origin": PAGE}),
        http.post("/v1/videos", json={}, headers={"Origin": PAGE}),
        httpx2.get(f"{service.urls[0]}/v1/models", headers={"Origin": PAGE}),
        httpx2.get(f"{service.urls[0]}/health/ready", headers={"Origin": PAGE}),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 422, 401, 200]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "origin" in answer.headers["vary"].lower()
        shown = answer.headers["access-control-expose-headers"]
        assert "X-Request-Id" in shown and "Retry-After" in shown and "RateLimit" in shown


def test_no_other_page_may_and_no_cache_gives_an_answer_to_another_origin(http: httpx2.Client) -> None:
    foreign, none = http.get("/v1/models", headers={"Origin": OTHER}), http.get("/v1/models")
    for answer in (foreign, none):
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"
    assert http.post("/v1/videos", json={"prompt": "x"}, headers={"Origin": OTHER}).status_code == 403


@pytest.mark.parametrize("path", MONITORED)
def test_head_is_answered_wherever_get_is(http: httpx2.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_of_a_stream_starts_no_viewer(http: httpx2.Client, until: Until) -> None:
    video = start(http, pacing="realtime")
    head = http.head(f"/v1/videos/{video}/stream")
    assert (head.status_code, head.headers["content-type"], head.content) == (200, "video/mp4", b"")
    assert http.head("/v1/videos/none/stream").status_code == 404
    until(lambda: status(http, video)["status"] == "cancelled", "cancelled, as nobody watched")


def test_allow_names_every_method_of_an_address(http: httpx2.Client) -> None:
    for path, methods in (("/v1/videos", "GET, HEAD, POST"), ("/v1/videos/x", "DELETE, GET, HEAD")):
        answer = http.put(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_a_live_answer_tells_proxies_to_pass_it_on_at_once_and_unchanged(http: httpx2.Client) -> None:
    answer = http.get(f"/v1/videos/{start(http, frames=9)}/stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-store, no-transform"


def test_a_lost_upgrade_is_said_in_words(service: Service) -> None:
    answer = httpx2.get(f"{service.urls[0]}/v1/realtime/video")
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
    assert "proxy" in answer.json()["detail"]


def test_unknown_fields_are_named_all_at_once(http: httpx2.Client) -> None:
    error = http.post("/v1/videos", json={"prompt": "x", "strength": 1, "frame_count": 2}).json()["error"]
    assert (error["code"], error["message"]) == ("unknown_field", "strength, frame_count: there is no such field")
