"""The WebSocket over real sockets: order, credits, steering, its limits, and going on after a broken connection."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from diagonal.mp4 import boxes
from serve.api.realtime import RealtimeLimits
from tests.serve.harness import FakeEngine, Service, Until, http_client, shade, shades
from tests.serve.sockets import closed, cut, stop_and_close, viewer

FAST: dict[str, Any] = {"extra_params": {"pacing": "none"}}


def interaction(prompt: str, event_id: str = "e1", chunks: int = 0) -> dict[str, Any]:
    return {"interaction": {"event_id": event_id, "event": {"prompt": prompt}, "transition_chunks": chunks}}


def test_a_session_is_a_start_then_each_chunk_behind_its_metadata_then_its_end(service: Service) -> None:
    with viewer(service.urls[0]) as one:
        started = one.start(num_frames=81, seed=3, format="m4s", **FAST)
        assert started["format"] == "m4s" and started["config"]["num_frames"] == 81
        assert (started["config"]["width"], started["config"]["fps"], started["config"]["seed"]) == (256, 16, 3)
        done = one.until("session.done")
        assert done == {"type": "session.done", "request_id": one.request_id, "chunks": 7, "stopped": False}
        assert one.indices == list(range(7)) and [chunk["num_frames"] for chunk in one.chunks] == [9] + [12] * 6
        assert [chunk["transport_chunk_index"] for chunk in one.chunks] == list(range(7))
        assert closed(one)[0] == 1000
    assert [name for name, _, _ in boxes(bytes(one.video))] == ["ftyp", "moov"] + ["moof", "mdat"] * 7
    assert len(shades(one.video)) == 81


@pytest.mark.slow
def test_a_prompt_change_is_queued_then_applied_and_told_with_its_chunks(service: Service, engine: FakeEngine) -> None:
    engine.allow(2)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81, **FAST)
        one.read(2)
        one.say("session.interaction", **interaction("a blue square", chunks=2))
        queued = one.until("session.interaction.queued")
        assert abs(queued.pop("received_at") - time.time()) < 30
        assert queued == {"type": "session.interaction.queued", "request_id": one.request_id, "event_id": "e1"}
        engine.allow(100)
        one.until("session.done")
    told = [(c["started_event_ids"], c["active_event_ids"], c["completed_event_ids"]) for c in one.chunks]
    assert told[1:5] == [([], [], []), (["e1"], ["e1"], []), ([], ["e1"], ["e1"]), ([], [], [])]
    assert abs(shades(one.video)[21] - shade("a blue square")) <= 2


def test_the_same_event_again_is_a_retry_and_with_other_content_a_conflict(
    service: Service, engine: FakeEngine
) -> None:
    engine.allow(0)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81)
        for _ in range(2):
            one.say("session.interaction", **interaction("a blue square"))
            assert one.next()["type"] == "session.interaction.queued"
        assert len(engine.sessions[one.request_id].pending) == 1
        one.say("session.interaction", **interaction("a green square"))
        error = one.next()
        assert (error["type"], error["code"], error["event_id"]) == ("error", "event_id_conflict", "e1")
        one.say("session.interaction", interaction={"event_id": "e2", "event": {"prompt": " "}})
        assert (error := one.next())["code"] == "prompt_empty" and error["event_id"] == "e2"
        one.say("session.ping")
        assert one.next() == {"type": "session.pong"}  # none of it ended the session


def test_at_most_so_many_interactions_wait(service: Service, engine: FakeEngine) -> None:
    engine.allow(0)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81)
        answers = []
        for number in range(65):
            one.say("session.interaction", **interaction("x", f"e{number}"))
            answers.append(one.next())
        assert [answer["type"] for answer in answers] == ["session.interaction.queued"] * 64 + ["error"]
        assert answers[-1]["code"] == "too_many_interactions" and answers[-1]["retry_after_seconds"]


@pytest.mark.slow
def test_without_credits_no_more_is_made_than_the_viewer_asked_to_have_ahead(
    service: Service, engine: FakeEngine
) -> None:
    with viewer(service.urls[0]) as one:
        one.start(num_frames=160, streaming_buffer_seconds=1.0)
        one.read(2)
        time.sleep(1.0)
        assert len(engine.made) == 2  # 1.3 s of media are there, and nothing was played
        one.say("session.playback", position_seconds=0.5)
        one.read(1)
        time.sleep(0.5)
        assert len(engine.made) == 3
        one.say("session.playback", position_seconds=10.0)
        one.until("session.done")
    assert len(shades(one.video)) == 160


def test_credits_that_were_not_asked_for_are_an_error(service: Service, engine: FakeEngine) -> None:
    engine.allow(0)
    with viewer(service.urls[0]) as one:
        one.start()
        for position, code in ((1.0, "no_credits"), (-1.0, "invalid_value"), (None, "invalid_value")):
            one.say("session.playback", position_seconds=position)
            assert one.next()["code"] == code
        one.socket.send('{"type": "session.playback", "position_seconds": NaN}')
        assert one.next()["code"] == "invalid_value"


def test_stop_ends_the_session_and_frees_its_place(service: Service, engine: FakeEngine, until: Until) -> None:
    with viewer(service.urls[0]) as one:
        one.start(num_frames=900)
        one.read(1)
        one.say("session.stop")
        done = one.until("session.done")
        assert done["stopped"] and done["chunks"] == len(one.chunks)
        assert closed(one)[0] == 1000
    until(lambda: not engine.sessions, "the place is free", seconds=25)


def test_a_viewer_who_leaves_frees_his_place_within_a_chunk(service: Service, engine: FakeEngine, until: Until) -> None:
    with viewer(service.urls[0]) as one:
        one.start(num_frames=900)
        one.read(1)
    made = len(engine.made)
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    assert len(engine.made) <= made + 1


def answering_late(gateway: Any, call: str, patch: pytest.MonkeyPatch) -> threading.Event:
    """What a call of the gateway gives is held back until the event is set."""
    work, gone = getattr(gateway, call), threading.Event()

    async def late(*about: Any) -> Any:
        given = await work(*about)
        await asyncio.to_thread(gone.wait, 10)
        return given

    patch.setattr(gateway, call, late)
    return gone


@pytest.mark.parametrize("stop", [True, False])
def test_who_leaves_before_an_answer_reached_him_left_properly_all_the_same(
    service: Service, engine: FakeEngine, until: Until, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    gone = answering_late(service.gateways[0], "interact", monkeypatch)
    engine.allow(1)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=900)
        one.read(1)
        one.say("session.interaction", **interaction("a blue square"))
        if stop:
            stop_and_close(one)
    gone.set()
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    assert engine.made == [(one.request_id, 0)]


def test_who_leaves_before_his_session_began_frees_its_place(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(reader_start_timeout_s=20.0)
    gone = answering_late(service.gateways[0], "create", monkeypatch)
    with viewer(service.urls[0]) as one:
        one.say("session.start", prompt="a red circle", num_frames=900)
        (made,) = until(lambda: list(engine.sessions), "it is being made")
    gone.set()
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    with http_client(service.urls[0]) as http:
        video = http.get(f"/v1/videos/{made}").json()
    assert (video["status"], video["error"]["code"]) == ("cancelled", "abandoned"), video


@pytest.mark.slow
@pytest.mark.parametrize("gateway", [0, 1])
def test_a_broken_connection_goes_on_with_the_next_chunk_through_any_gateway(
    service: Service, engine: FakeEngine, gateway: int
) -> None:
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81)
        one.read(2)
        cut(one)
    time.sleep(0.3)
    made = len(engine.made)
    time.sleep(0.5)
    assert len(engine.made) <= made + 1  # nobody watches
    with viewer(service.urls[gateway]) as two:
        started = two.start(resume_token=one.resume_token)
        assert (started["request_id"], started["next_chunk"]) == (one.request_id, 2)
        two.until("session.done")
    assert two.indices == [2, 3, 4, 5, 6]
    assert len(shades(one.video + two.video)) == 81
    assert [chunk for _, chunk in engine.made] == list(range(7))


@pytest.mark.slow
def test_a_resume_token_counts_once_and_the_older_connection_is_told(service: Service, engine: FakeEngine) -> None:
    engine.allow(1)
    with viewer(service.urls[0]) as one, viewer(service.urls[1]) as two, viewer(service.urls[1]) as three:
        one.start(num_frames=81)
        one.read(1)
        two.start(resume_token=one.resume_token)
        code, error = closed(one)
        assert (code, error["code"]) == (4001, "session_taken_over")
        three.say("session.start", resume_token=one.resume_token)
        code, error = closed(three)
        assert (code, error["code"], error["param"]) == (1008, "session_not_found", "resume_token")
        engine.allow(100)
        two.until("session.done")
        assert two.indices == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_who_does_not_come_back_in_time_has_lost_his_session(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(resume_window_s=0.5)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=900)
        one.read(1)
        cut(one)
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    with viewer(service.urls[0]) as two:
        two.say("session.start", resume_token=one.resume_token)
        assert two.until("session.done")["stopped"]


@pytest.mark.parametrize("token", ["", "rt", "rt_x_y.1", "rt_x_y", "x" * 100, "rt_x_y.-1", "rt_x_y.9999999999", "é.1"])
def test_a_wrong_resume_token_is_refused(idle_service: Service, token: str) -> None:
    with viewer(idle_service.urls[0]) as one:
        one.say("session.start", resume_token=token)
        assert closed(one)[1]["code"] == "session_not_found"


@pytest.mark.parametrize(
    ("sent", "code", "close"),
    [
        ("{", "invalid_json", 1008),
        ("[]", "invalid_json", 1008),
        ("[" * 60_000, "invalid_json", 1008),
        (b"binary", "unsupported_message", 1003),
        ("x" * 200_000, "message_too_large", 1009),
        (json.dumps({"type": "session.ping"}), "unexpected_message", 1008),
        (json.dumps({"type": "session.start"}), "prompt_empty", 1008),
        (json.dumps({"type": "session.start", "prompt": "x" * 201}), "prompt_too_long", 1008),
        (json.dumps({"type": "session.start", "prompt": "x", "format": "webm"}), "invalid_value", 1008),
        (json.dumps({"type": "session.start", "prompt": "x", "model": "other"}), "model_not_found", 1008),
        (json.dumps({"type": "session.start", "prompt": "x", "speed": 2}), "unknown_field", 1008),
        (json.dumps({"type": "session.start", "prompt": "x", "streaming_buffer_seconds": 0}), "invalid_value", 1008),
        (json.dumps({"type": "session.start", "prompt": "x", "num_frames": 10**9}), "invalid_value", 1008),
    ],
)
def test_a_wrong_start_is_told_and_makes_nothing(
    idle_service: Service, sent: str | bytes, code: str, close: int
) -> None:
    with viewer(idle_service.urls[0]) as one:
        one.socket.send(sent)
        got, error = closed(one)
        assert (got, error["code"]) == (close, code)
    assert not idle_service.engine.sessions


def test_a_wrong_message_in_mid_stream_is_told_and_the_stream_goes_on(service: Service, engine: FakeEngine) -> None:
    engine.allow(0)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=21, **FAST)
        wrong = (("{", "invalid_json"), ('{"type": "session.dance"}', "unknown_message"), ("5", "invalid_json"))
        for sent, code in wrong:
            one.socket.send(sent)
            assert one.next()["code"] == code
        engine.allow(10)
        assert one.until("session.done")["chunks"] == 2


def test_a_message_that_is_too_large_ends_the_session(service: Service, engine: FakeEngine, until: Until) -> None:
    engine.allow(0)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=21)
        one.say("session.ping", filler="x" * 200_000)
        assert closed(one)[0] == 1009
    until(lambda: not engine.sessions, "the place is free", seconds=25)


def test_a_session_that_does_not_start_in_time_is_closed(make_service: Callable[..., Service]) -> None:
    service = make_service(limits=RealtimeLimits(start_timeout_s=0.2))
    with viewer(service.urls[0]) as one:
        code, error = closed(one)
        assert (code, error["code"]) == (1008, "start_timeout")


@pytest.mark.slow
def test_a_session_in_which_nothing_moves_is_ended_unless_it_pings(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(limits=RealtimeLimits(stall_timeout_s=1.5))
    engine.allow(0)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=21)
        for _ in range(4):
            time.sleep(0.6)
            one.say("session.ping")
            assert one.next()["type"] == "session.pong"
        code, error = closed(one)
        assert (code, error["code"]) == (1008, "stall_timeout")
    until(lambda: not engine.sessions, "the place is free", seconds=25)


def test_a_full_server_says_when_to_come_again(service: Service, engine: FakeEngine) -> None:
    engine.allow(0)
    urls = service.urls
    with viewer(urls[0]) as one, viewer(urls[1]) as two, viewer(urls[0]) as three:
        one.start()
        two.start()
        three.say("session.start", prompt="a red circle")
        code, error = closed(three)
        assert (code, error["code"], error["retry_after_seconds"]) == (1013, "server_full", 2.5)


def test_a_session_that_fails_is_told_and_nothing_of_the_inside(service: Service, engine: FakeEngine) -> None:
    engine.fail_at = 1
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81, **FAST)
        code, error = closed(one)
    assert (code, error["code"]) == (1011, "generation_failed")
    assert "SECRET_X" not in json.dumps(one.others)


def test_a_finished_session_is_a_video_like_any_other(service: Service, http: httpx2.Client, until: Until) -> None:
    with viewer(service.urls[0]) as one:
        one.start(num_frames=21, **FAST)
        one.until("session.done")
    until(lambda: http.get(f"/v1/videos/{one.request_id}").json()["status"] == "completed", "completed")
    assert len(shades(http.get(f"/v1/videos/{one.request_id}/content").content)) == 21


@pytest.mark.slow
def test_a_slow_reader_holds_up_nobody_else(service: Service, engine: FakeEngine) -> None:
    with viewer(service.urls[0], max_queue=1) as slow, viewer(service.urls[0]) as quick:
        slow.start(num_frames=900, streaming_buffer_seconds=1.0)
        quick.start(num_frames=81, **FAST)
        quick.until("session.done")
        assert len(shades(quick.video)) == 81
        assert sum(video == slow.request_id for video, _ in engine.made) <= 2
