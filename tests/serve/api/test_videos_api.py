"""The jobs API over real sockets: what is made, what is told, and what each wrong request gets."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import av
import httpx2
import pytest

from tests.serve.harness import CONFIG, FakeEngine, Service, Until, finished


def decoded_frames(data: bytes) -> list[Any]:
    with av.open(io.BytesIO(data), mode="r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("frames", [1, 9, 10, 81, 100])
def test_any_number_of_frames_is_made_exactly(http: httpx2.Client, until: Until, frames: int) -> None:
    video = finished(http, until, num_frames=frames)
    assert (video["num_frames"], video["frames_done"], video["progress"]) == (frames, frames, 100)
    content = http.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert len(content.content) == int(content.headers["content-length"])
    assert len(decoded_frames(content.content)) == frames


def test_a_video_without_a_length_is_as_long_as_the_models_clip(http: httpx2.Client, until: Until) -> None:
    video = finished(http, until)
    assert (video["num_frames"], video["fps"], video["seconds"], video["size"]) == (81, 16, "5.0625", "256x256")


def test_both_sizes_are_made(http: httpx2.Client, until: Until) -> None:
    for size, side in (("256x256", 256), ("32x32", 32)):
        video = finished(http, until, size=size, num_frames=9)
        frames = decoded_frames(http.get(f"/v1/videos/{video['id']}/content").content)
        assert frames[0].shape == (side, side, 3)


def test_a_form_says_the_same_as_json(http: httpx2.Client) -> None:
    fields = {"prompt": "a red circle", "seconds": "2", "size": "256x256", "seed": "7", "extra": '{"pacing": "none"}'}
    for body in ({"data": fields}, {"files": {name: (None, value) for name, value in fields.items()}}):
        video = http.post("/v1/videos", **body).raise_for_status().json()
        assert (video["num_frames"], video["seed"], video["object"]) == (32, 7, "video")
        http.delete(f"/v1/videos/{video['id']}")


@pytest.mark.parametrize("name", ["extra", "extra_params", "extra_body"])
def test_extra_fields_may_stand_under_each_of_the_usual_names(http: httpx2.Client, name: str) -> None:
    video = http.post("/v1/videos", json={"prompt": "a red circle", name: {"pacing": "realtime"}}).json()
    assert video["pacing"] == "realtime"


def test_the_list_is_newest_first_in_pages(http: httpx2.Client, until: Until) -> None:
    ids = [finished(http, until, num_frames=1)["id"] for _ in range(3)]
    first = http.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in first["data"]] == ids[:0:-1] and first["has_more"]
    second = http.get("/v1/videos", params={"limit": 2, "after": first["last_id"]}).json()
    assert [video["id"] for video in second["data"]] == ids[:1] and not second["has_more"]
    oldest = http.get("/v1/videos", params={"order": "asc"}).json()
    assert [video["id"] for video in oldest["data"]] == ids


WRONG = [
    ({"prompt": ""}, 422, "prompt_empty", "prompt"),
    ({"prompt": " \n\t"}, 422, "prompt_empty", "prompt"),
    ({"prompt": "x" * 201}, 422, "prompt_too_long", "prompt"),
    ({"prompt": 3}, 422, "invalid_value", "prompt"),
    ({"prompt": None}, 422, "invalid_value", "prompt"),
    ({}, 422, "missing_field", "prompt"),
    ([], 422, "invalid_value", "body"),
    ({"prompt": "x", "num_frames": 0}, 422, "invalid_value", "num_frames"),
    ({"prompt": "x", "num_frames": -1}, 422, "invalid_value", "num_frames"),
    ({"prompt": "x", "num_frames": True}, 422, "invalid_value", "num_frames"),
    ({"prompt": "x", "num_frames": "81"}, 422, "invalid_value", "num_frames"),
    ({"prompt": "x", "num_frames": 8.5}, 422, "invalid_value", "num_frames"),
    ({"prompt": "x", "num_frames": 961}, 400, "invalid_value", "num_frames"),
    ({"prompt": "x", "num_frames": 10**30}, 400, "invalid_value", "num_frames"),
    ({"prompt": "x", "seconds": 61}, 400, "invalid_value", "seconds"),
    ({"prompt": "x", "seconds": 0}, 400, "invalid_value", "seconds"),
    ({"prompt": "x", "seconds": "soon"}, 422, "invalid_value", "seconds"),
    ({"prompt": "x", "seconds": "nan"}, 422, "invalid_value", "seconds"),
    ({"prompt": "x", "seconds": 2, "num_frames": 81}, 400, "invalid_value", "num_frames"),
    ({"prompt": "x", "size": "832x480"}, 400, "invalid_value", "size"),
    ({"prompt": "x", "size": 256}, 422, "invalid_value", "size"),
    ({"prompt": "x", "width": 256}, 422, "invalid_value", "width"),
    ({"prompt": "x", "width": 832, "height": 480}, 400, "invalid_value", "size"),
    ({"prompt": "x", "fps": 24}, 400, "invalid_value", "fps"),
    ({"prompt": "x", "seed": -1}, 422, "invalid_value", "seed"),
    ({"prompt": "x", "seed": 2**32}, 422, "invalid_value", "seed"),
    ({"prompt": "x", "seed": 1.5}, 422, "invalid_value", "seed"),
    ({"prompt": "x", "model": "sora-2"}, 404, "model_not_found", "model"),
    ({"prompt": "x", "guidance": 5}, 422, "unknown_field", "guidance"),
    ({"prompt": "x", "extra": {"pacing": "fast"}}, 422, "invalid_value", "extra.pacing"),
    ({"prompt": "x", "extra": {"speed": 1}}, 422, "unknown_field", "extra.speed"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), WRONG, ids=[json.dumps(case[0])[:60] for case in WRONG])
def test_a_wrong_request_is_told_its_field_and_makes_nothing(
    idle_http: httpx2.Client, idle_service: Service, body: object, status: int, code: str, param: str
) -> None:
    answer = idle_http.post("/v1/videos", json=body)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["error"]["code"]) == (status, status, code)
    assert problem["error"]["param"] == param and problem["detail"] == problem["error"]["message"]
    assert {"type", "title"} <= set(problem) and not idle_service.engine.sessions
    assert idle_http.get("/v1/videos").json()["data"] == []


def test_a_wrong_size_is_answered_with_the_allowed_ones(idle_http: httpx2.Client) -> None:
    detail = idle_http.post("/v1/videos", json={"prompt": "x", "size": "832x480"}).json()["detail"]
    assert "size" in detail and "832x480" in detail and "256x256 or 32x32" in detail


def test_a_value_is_not_repeated_at_length(idle_http: httpx2.Client) -> None:
    assert len(idle_http.post("/v1/videos", json={"prompt": "x", "size": "y" * 10_000}).text) < 1000


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 422),
        (b"prompt", "text/plain", 415),
        (b"nothing", "multipart/form-data; boundary=x", 400),
        (b"nothing", "multipart/form-data", 400),
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded", 422),
        (b" " * 70_000, "application/json", 413),
    ],
)
def test_a_body_that_cannot_be_read_is_a_problem(
    idle_http: httpx2.Client, content: bytes, kind: str, status: int
) -> None:
    answer = idle_http.post("/v1/videos", content=content, headers={"Content-Type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


def test_a_form_with_a_file_or_a_wrong_number_is_refused(idle_http: httpx2.Client) -> None:
    picture = idle_http.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": b"png"})
    assert (picture.status_code, picture.json()["error"]["code"]) == (422, "unsupported_field")
    number = idle_http.post("/v1/videos", data={"prompt": "x", "num_frames": "many"})
    assert (number.status_code, number.json()["error"]["param"]) == (422, "num_frames")


@pytest.mark.parametrize("path", ["", "/content", "/stream"])
def test_an_unknown_video_is_not_found(idle_http: httpx2.Client, path: str) -> None:
    for name in ("video_none", "..%2f..%2fetc%2fpasswd", "%00"):
        assert idle_http.get(f"/v1/videos/{name}{path}").status_code == 404
    assert idle_http.delete("/v1/videos/video_none").json()["error"]["code"] == "video_not_found"


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": "many"}, {"limit": 101}, {"order": "up"}])
def test_a_wrong_query_is_told_its_field(idle_http: httpx2.Client, query: dict[str, Any]) -> None:
    answer = idle_http.get("/v1/videos", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, next(iter(query)))


def test_an_unknown_route_or_method_is_a_problem_too(idle_http: httpx2.Client) -> None:
    for answer, status in ((idle_http.get("/v1/nothing"), 404), (idle_http.put("/v1/videos"), 405)):
        assert (answer.status_code, answer.json()["status"]) == (status, status)


def test_content_that_is_not_ready_is_a_conflict(http: httpx2.Client, engine: FakeEngine) -> None:
    engine.allow(1)
    video = http.post("/v1/videos", json={"prompt": "a red circle"}).json()
    answer = http.get(f"/v1/videos/{video['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_not_ready")


def test_a_full_server_says_when_to_come_again(http: httpx2.Client, engine: FakeEngine, service: Service) -> None:
    engine.allow(0)
    for _ in range(2):
        assert http.post("/v1/videos", json={"prompt": "a red circle"}).status_code == 200
    answer = http.post("/v1/videos", json={"prompt": "a red circle"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert service.metrics.labels("diagonal_rejected_total") == [{"reason": "full"}]


def test_deleting_a_running_video_frees_its_place(http: httpx2.Client, engine: FakeEngine, until: Until) -> None:
    engine.allow(1)
    video = http.post("/v1/videos", json={"prompt": "a red circle"}).json()
    answer = http.delete(f"/v1/videos/{video['id']}").json()
    assert answer == {"id": video["id"], "object": "video.deleted", "deleted": True}
    until(lambda: not engine.sessions, "the session is closed")
    assert http.get(f"/v1/videos/{video['id']}").status_code == 404


def test_deleting_a_finished_video_removes_its_files(http: httpx2.Client, until: Until, service: Service) -> None:
    video = finished(http, until)
    folder = Path(service.settings.data) / "videos" / video["id"]
    assert len(list(folder.iterdir())) == 9  # the initialisation segment, seven chunks, the file
    http.delete(f"/v1/videos/{video['id']}")
    assert not folder.exists()


def test_the_model_says_what_can_be_asked_for(idle_http: httpx2.Client) -> None:
    (model,) = idle_http.get("/v1/models").json()["data"]
    assert (model["id"], model["sizes"], model["fps"]) == ("fake-tiny", ["256x256", "32x32"], 16)
    assert model["limits"]["max_frames"] == 960 and model["limits"]["max_prompt_characters"] == 200


def test_a_prompt_longer_than_the_model_reads_is_told(http: httpx2.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    most = model["limits"]["max_prompt_tokens"]
    assert most == CONFIG.model.text_tokens
    for words in (1, most + 5):
        video = http.post("/v1/videos", json={"prompt": " ".join(["red"] * words)}).json()
        assert video["prompt_tokens"] == words + 1
        assert http.delete(f"/v1/videos/{video['id']}").status_code == 200


def test_a_broken_engine_makes_the_service_not_ready_but_alive(
    http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    assert http.get("/health/ready").json() == {"status": "ready"}
    engine.break_at = 0
    http.post("/v1/videos", json={"prompt": "a red circle"})
    until(lambda: http.get("/health/ready").status_code == 503, "not ready")
    assert http.get("/health/live").json() == {"status": "live"}


def test_a_page_of_another_origin_may_change_nothing(http: httpx2.Client) -> None:
    foreign = http.post("/v1/videos", data={"prompt": "x"}, headers={"Origin": "http://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "foreign_origin")
    own = {"Origin": str(http.base_url).rstrip("/")}
    assert http.post("/v1/videos", data={"prompt": "x"}, headers=own).status_code == 200


def test_the_api_describes_itself_and_every_reference_leads_somewhere(idle_http: httpx2.Client) -> None:
    answer = idle_http.get("/openapi.json")
    api = answer.json()
    body = api["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    assert "num_frames" in api["components"]["schemas"]["VideoRequest"]["properties"]
    assert "/v1/videos/{video_id}/stream" in api["paths"]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', answer.text))
    assert named and named <= set(api["components"]["schemas"])


def test_prompts_are_in_no_log(http: httpx2.Client, until: Until, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    finished(http, until, prompt="CANARY-PROMPT", num_frames=1)
    http.post("/v1/videos", json={"prompt": "CANARY-PROMPT" * 100})
    assert "CANARY" not in caplog.text
