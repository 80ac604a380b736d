"""Requests as other services' clients write them: what means nothing here is named, what cannot be is refused."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tests.serve.harness import FakeEngine, Service, Until, finished
from tests.serve.sockets import viewer

# What vLLM-Omni's own clients send, older and newer ones.
OMNI: dict[str, Any] = {
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "negative_prompt": "blurry",
    "lora": None,
    "image_reference": None,
    "extra_params": {"is_enable_stage2": False},
}


def test_a_session_of_vllm_omnis_client_starts_and_hears_what_was_ignored(service: Service) -> None:
    with viewer(service.urls[0]) as one:
        started = one.start(num_frames=9, **OMNI)
        ignored = ["num_inference_steps", "guidance_scale", "negative_prompt", "lora", "image_reference"]
        assert started["ignored"] == [*ignored, "extra_params.is_enable_stage2"]
        assert started["config"]["extra_params"]["pacing"] == "realtime"
        one.until("session.done")
    with viewer(service.urls[0]) as two:
        assert "ignored" not in two.start(num_frames=9)
        two.until("session.done")


def test_the_newer_pacing_is_that_of_a_buffer(service: Service, engine: FakeEngine) -> None:
    pacing = {
        "enabled": True,
        "mode": "client_playhead",
        "max_lead_ms": 1500,
        "max_output_bytes": 10**6,
        "idle_timeout_s": 9,
    }
    with viewer(service.urls[0]) as one:
        assert one.start(num_frames=81, streaming_pacing=pacing)["config"]["streaming_buffer_seconds"] == 1.5
        one.say("session.playback", position_seconds=5.0)
        one.until("session.done")
    with viewer(service.urls[0]) as two:
        off = two.start(num_frames=9, streaming_pacing={"enabled": False})
        assert "streaming_buffer_seconds" not in off["config"]
        two.until("session.done")


def test_who_stops_hears_how_long_it_took(service: Service, engine: FakeEngine) -> None:
    engine.allow(1)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81)
        one.read(1)
        one.say("session.stop")
        done = one.until("session.done")
    assert done["stopped"] is True and 0 <= done["stop_latency_s"] < 10


@pytest.mark.parametrize(
    ("name", "value"), [("input_reference", "data:image/png;base64,AAAA"), ("lora", {"name": "ink"})]
)
def test_what_would_change_the_video_and_cannot_is_refused_with_its_reason(
    http: httpx2.Client, name: str, value: object
) -> None:
    answer = http.post("/v1/videos", json={"prompt": "a red circle", name: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "unsupported_field", name)
    assert "is not supported: " in error["message"]


def test_extras_stand_at_the_top_level_where_people_put_them(http: httpx2.Client) -> None:
    body = {"prompt": "a red circle", "endless": True, "record": True, "user": "u1"}
    video = http.post("/v1/videos", json=body).raise_for_status().json()
    assert (video["endless"], video["pacing"], video["num_frames"], video["ignored"]) == (
        True,
        "realtime",
        None,
        ["user"],
    )
    assert http.get(f"/v1/videos/{video['id']}").json()["ignored"] == []
    http.delete(f"/v1/videos/{video['id']}")


def test_a_nested_extra_body_of_a_form_is_read_as_openais_sdks_write_it(http: httpx2.Client) -> None:
    fields = {"prompt": "a red circle", "extra_body[pacing]": "realtime", "extra_body[record]": "true", "seconds": "1"}
    video = http.post("/v1/videos", files={name: (None, value) for name, value in fields.items()}).raise_for_status()
    assert video.json()["pacing"] == "realtime" and video.json()["num_frames"] == 16
    wrong = {**fields, "extra_body[a][b]": "1"}
    answer = http.post("/v1/videos", files={name: (None, value) for name, value in wrong.items()})
    assert answer.status_code == 422 and answer.json()["error"]["param"] == "extra_body[a][b]"


@pytest.mark.parametrize("body", [{"extra": {"pacin": "none"}}, {"pacin": "none", "num_frame": 3}])
def test_a_wrong_name_is_still_an_error_and_all_of_them_are_told(http: httpx2.Client, body: dict[str, Any]) -> None:
    answer = http.post("/v1/videos", json={"prompt": "a red circle", **body})
    assert answer.status_code == 422 and all(name in answer.text for name in body)


def test_a_finished_video_says_how_long_it_took(http: httpx2.Client, until: Until) -> None:
    assert 0 <= finished(http, until, num_frames=9)["inference_time_s"] < 60


@pytest.mark.parametrize("names", [("extra[pacing]", "extra"), ("extra", "extra[pacing]")])
def test_a_form_that_says_a_field_whole_and_in_parts_is_refused(http: httpx2.Client, names: tuple[str, str]) -> None:
    values = {"extra[pacing]": "realtime", "extra": '{"record": true}'}
    parts = [("prompt", (None, "x")), *((name, (None, values[name])) for name in names)]
    answer = http.post("/v1/videos", files=parts)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "repeated_field")
