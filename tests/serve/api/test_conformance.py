"""The running service against its own description: whatever is sent, no answer is a 5xx, and each is described."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.harness import FakeEngine, Service, http_client

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
TAKES_PARAMETERS = [
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos"),
    ("POST", "/v1/videos/{video_id}/interactions"),
    ("GET", "/v1/videos/{video_id}/content"),
    ("GET", "/v1/videos/{video_id}/stream"),
    ("POST", "/v1/realtime/client_secrets"),
    ("GET", "/v1/videos/{video_id}/chain"),
    ("POST", "/v1/videos/{video_id}/viewers"),
    ("GET", "/v1/shared/{token}/index.m3u8"),
    ("GET", "/v1/shared/{token}/chunks/{chunk}.m4s"),
    ("POST", "/v1/shared/{token}/interactions"),
]
TAKES_NONE = [
    ("GET", "/v1/videos/{video_id}"),
    ("DELETE", "/v1/videos/{video_id}"),
    ("GET", "/v1/videos/{video_id}/viewers"),
    ("DELETE", "/v1/videos/{video_id}/viewers/{viewer_id}"),
    ("GET", "/v1/shared/{token}"),
    ("GET", "/v1/shared/{token}/init.mp4"),
    ("GET", "/v1/shared/{token}/content"),
    ("GET", "/v1/models"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(*one, mode) for one in TAKES_PARAMETERS for mode in (RIGHT, WRONG)] + [(*one, RIGHT) for one in TAKES_NONE]
HUGE = [2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**400]
NO_NUMBER: list[Any] = ["", "x", "1", True, [], {}, [[[[1]]]], {"a": {"b": 1}}, 1.5, float("nan"), float("inf")]
NO_TEXT: list[Any] = [1, True, [], {}, ["x"], {"a": "b"}]


@pytest.fixture(scope="module")
def description(idle_http: httpx2.Client) -> Any:
    return schemathesis.openapi.from_dict(idle_http.get("/openapi.json").json())


def test_every_route_of_the_application_is_described(idle_http: httpx2.Client, idle_service: Service) -> None:
    described = {
        (method.upper(), path)
        for path, operations in idle_http.get("/openapi.json").json()["paths"].items()
        for method in operations
    }
    assert set(TAKES_PARAMETERS + TAKES_NONE) <= described and ("HEAD", "/v1/videos/{video_id}/content") in described


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_whatever_is_sent_each_answer_is_one_that_the_description_knows(
    description: Any, idle_service: Service, method: str, path: str, mode: GenerationMode
) -> None:
    operation = description[path][method]
    checked = []

    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=idle_service.urls[0], timeout=60)
        case.validate_response(response, checks=CHECKS)
        checked.append(response.status_code)

    try:
        ask()
    finally:
        free(idle_service)
    assert checked


def body(field: str, value: object) -> bytes:
    """A request for a video with one field; NaN and the like are written as Python does."""
    return json.dumps({"prompt": "a red circle"} | {field: value}).encode()


def asked(http: httpx2.Client, path: str, data: bytes) -> tuple[int, str | None]:
    """The status, and the field that an error names."""
    answer = http.post(path, content=data, headers={"Content-Type": "application/json"})
    told = answer.json()
    if path == "/v1/videos" and answer.is_success:
        http.delete(f"/v1/videos/{told['id']}").raise_for_status()
    return answer.status_code, told.get("error", {}).get("param") if answer.is_error else None


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [("num_frames", 1, 960), ("seed", 0, 2**32 - 1), ("width", 0, 0), ("height", 0, 0), ("fps", 16, 16)],
)
def test_a_number_is_taken_to_its_edges_and_refused_behind_them(
    idle_http: httpx2.Client, field: str, least: int, most: int
) -> None:
    inside = [] if field in ("width", "height") else [least, most, None]
    for value in inside:
        assert asked(idle_http, "/v1/videos", body(field, value)) == (200, None), value
    for value in [least - 1, most + 1, *(huge for huge in HUGE if not least <= huge <= most), *NO_NUMBER]:
        status, param = asked(idle_http, "/v1/videos", body(field, value))
        assert status in (400, 422) and param in (field, "width", "size"), value


@pytest.mark.parametrize("field", ["model", "size", "seconds", "prompt"])
def test_a_text_of_another_kind_length_or_script_is_never_an_error_of_the_server(
    idle_http: httpx2.Client, field: str
) -> None:
    texts = ["", " ", "x" * 201, "x" * 60_000, "\x00", "a\x00b", "\ud800", "\U0001f600" * 10, "\u202e", "../../x"]
    for value in [*texts, *NO_TEXT, *HUGE, float("nan")]:
        status, _ = asked(idle_http, "/v1/videos", body(field, value))
        assert status in (200, 400, 404, 422), value
    assert asked(idle_http, "/v1/videos", body("prompt", "\U0001f600" * 200)) == (200, None)  # characters, not bytes


def interaction(**fields: Any) -> bytes:
    return json.dumps({"interaction": {"event": {"prompt": "x"}} | fields}).encode()


def test_an_interaction_is_taken_to_its_edges_and_refused_behind_them(http: httpx2.Client, engine: FakeEngine) -> None:
    engine.allow(0)
    path = f"/v1/videos/{http.post('/v1/videos', json={'prompt': 'a red circle'}).json()['id']}/interactions"
    for fields in ({"transition_chunks": 0}, {"transition_chunks": 64}, {"event_id": "e"}, {"event_id": "e" * 128}):
        assert asked(http, path, interaction(**fields))[0] == 202, fields
    wrong = [{"transition_chunks": value} for value in (-1, 65, *HUGE, *NO_NUMBER)]
    wrong += [{"event_id": value} for value in ("", "e" * 129, "a b", "\x00", "é", *NO_TEXT)]
    wrong += [{"event": {"prompt": value}} for value in ("", "\x00", "x" * 201, *NO_TEXT, None)]
    wrong += [{"event": {"action": value}} for value in ("", "stop", *NO_TEXT)]
    for fields in wrong:
        assert asked(http, path, interaction(**fields))[0] in (400, 422), fields


@pytest.mark.parametrize(
    ("path", "name", "least", "most"), [("", "limit", 1, 100), ("/x/stream", "start_chunk", 0, 2**31 - 1)]
)
def test_a_query_is_taken_to_its_edges_and_refused_behind_them(
    idle_http: httpx2.Client, path: str, name: str, least: int, most: int
) -> None:
    for value in (least, most):
        assert idle_http.get(f"/v1/videos{path}", params={name: value}).status_code == (404 if path else 200)
    for wrong in map(str, (least - 1, most + 1, *HUGE, "", "x", "1.5", "NaN", "\x00", "é" * 99)):
        answer = idle_http.get(f"/v1/videos{path}", params={name: wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, name), wrong


def test_a_secret_lives_from_one_second_to_a_minute(idle_http: httpx2.Client) -> None:
    def ask(seconds: object) -> int:
        data = json.dumps({"expires_after": {"seconds": seconds}}).encode()
        return asked(idle_http, "/v1/realtime/client_secrets", data)[0]

    assert [ask(1), ask(60)] == [200, 200]
    assert {ask(value) for value in (0, 61, *HUGE, *NO_NUMBER)} <= {400, 422}


def free(service: Service) -> None:
    """Remove what was made, so that the next one finds room."""
    with http_client(service.urls[0]) as http:
        for video in http.get("/v1/videos", params={"limit": 100}).json()["data"]:
            http.delete(f"/v1/videos/{video['id']}")
