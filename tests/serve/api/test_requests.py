"""Requests that come twice, that are wrong, or that come too late; and a store that goes away in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from serve.records import Status
from tests.s3 import S3Server, environment
from tests.serve.harness import FakeEngine, Service, Until, http_client, shades, start, status

CHANGE = {"interaction": {"event_id": "e1", "event": {"prompt": "a blue square"}}}


def test_the_same_request_again_is_the_same_video(
    http: httpx2.Client, other_http: httpx2.Client, engine: FakeEngine
) -> None:
    engine.allow(0)
    body = {"prompt": "a red circle", "num_frames": 21, "seed": 5}
    first = http.post("/v1/videos", json=body, headers={"Idempotency-Key": "k1"})
    again = other_http.post("/v1/videos", json=dict(reversed(body.items())), headers={"Idempotency-Key": "k1"})
    assert first.json()["id"] == again.json()["id"] and len(engine.sessions) == 1
    other = http.post("/v1/videos", json=body | {"seed": 6}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_conflict")
    assert http.post("/v1/videos", json=body, headers={"Idempotency-Key": "k2"}).json()["id"] != first.json()["id"]


def test_of_the_same_request_sent_at_once_one_makes_a_video(service: Service, engine: FakeEngine) -> None:
    engine.allow(0)
    answers: list[httpx2.Response] = []

    def ask(url: str) -> None:
        with http_client(url) as client:
            answers.append(client.post("/v1/videos", json={"prompt": "x"}, headers={"Idempotency-Key": "k1"}))

    threads = [threading.Thread(target=ask, args=(service.urls[number % 2],)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(engine.sessions) == 1 and {answer.status_code for answer in answers} <= {200, 409}
    assert {answer.json()["id"] for answer in answers if answer.status_code == 200} == set(engine.sessions)


def test_a_refused_request_may_be_made_again_with_its_key(http: httpx2.Client, engine: FakeEngine) -> None:
    engine.allow(0)
    fillers = [start(http) for _ in range(2)]
    headers = {"Idempotency-Key": "k1"}
    assert http.post("/v1/videos", json={"prompt": "x"}, headers=headers).status_code == 429
    http.delete(f"/v1/videos/{fillers[0]}")
    engine.allow(100)
    assert http.post("/v1/videos", json={"prompt": "x"}, headers=headers).status_code in (200, 429)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
def test_a_wrong_idempotency_key_is_told(idle_http: httpx2.Client, key: str) -> None:
    answer = idle_http.post("/v1/videos", json={"prompt": "x"}, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_finished_video_takes_no_changes_but_knows_those_that_it_took(http: httpx2.Client, until: Until) -> None:
    video = start(http, frames=21)
    until(lambda: status(http, video)["status"] == "completed", "completed")
    answer = http.post(f"/v1/videos/{video}/interactions", json=CHANGE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_over")
    assert status(http, video)["interactions"] == []


def test_a_change_that_comes_while_the_last_chunk_is_made_is_told_to_be_dropped(
    http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    engine.allow(1)
    video = start(http, frames=21)
    until(lambda: status(http, video)["chunks_done"] == 1, "one chunk")
    assert http.post(f"/v1/videos/{video}/interactions", json=CHANGE).status_code == 202
    http.post(f"/v1/videos/{video}/interactions", json=CHANGE)
    engine.sessions[video].pending = ()  # as if the chunk had begun before it came
    engine.allow(10)
    until(lambda: status(http, video)["status"] == "completed", "completed")
    assert [change["status"] for change in status(http, video)["interactions"]] == ["dropped"]


def test_a_wrong_method_is_told_the_right_ones(idle_http: httpx2.Client) -> None:
    answer = idle_http.put("/v1/videos")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] and answer.json()["request_id"] == answer.headers["x-request-id"]


def test_limits_are_published(idle_http: httpx2.Client) -> None:
    limits = idle_http.get("/v1/models").json()["data"][0]["limits"]
    assert (limits["max_body_bytes"], limits["max_message_bytes"]) == (64 * 1024, 128 * 1024)
    assert (limits["max_sessions"], limits["max_pending_interactions"]) == (None, 64)


@pytest.mark.slow
def test_a_store_that_is_away_for_a_while_costs_no_video(
    http: httpx2.Client, service: Service, engine: FakeEngine, until: Until
) -> None:
    engine.allow(2)
    video = start(http)
    until(lambda: status(http, video)["chunks_done"] == 2, "two chunks")
    with http.stream("GET", f"/v1/videos/{video}/stream") as stream:
        parts = stream.iter_raw()
        data = next(parts)
        service.run(service.kill_store())
        engine.allow(100)
        answer = httpx2.get(f"{service.urls[1]}/v1/videos/{video}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert httpx2.get(f"{service.urls[1]}/health/ready").status_code == 503
        service.run(service.restart_store())
        data += b"".join(parts)
    assert len(shades(data)) == 81 and [chunk for _, chunk in engine.made] == list(range(7))
    until(lambda: status(http, video)["status"] == "completed", "completed")


def test_a_file_that_was_not_made_when_the_store_went_away_is_made_afterwards(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    service = make_service(store={"sweep_s": 0.2})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with http_client(service.urls[0]) as http, monkeypatch.context() as broken:
        broken.setattr("serve.store.media_files.write_fragments", full)
        video = start(http, frames=21)
        until(lambda: status(http, video)["frames_done"] == 21, "all chunks")
        assert (status(http, video)["status"], status(http, video)["progress"]) == ("in_progress", 99)
        broken.undo()
        until(lambda: status(http, video)["status"] == "completed", "completed")
        assert len(shades(http.get(f"/v1/videos/{video}/content").content)) == 21


@pytest.mark.slow
def test_a_video_is_removed_when_its_time_is_up(make_service: Callable[..., Service], until: Until) -> None:
    service = make_service(store={"sweep_s": 0.1}, retention_s=1.0)
    with http_client(service.urls[0]) as http:
        video = start(http, frames=21)
        told = until(lambda: (v := status(http, video)).get("status") == "completed" and v, "completed")
        assert 0 <= told["expires_at"] - told["completed_at"] <= 2
        folder = Path(service.settings.data) / "videos" / video
        assert folder.is_dir()
        until(lambda: http.get(f"/v1/videos/{video}").status_code == 404 and not folder.exists(), "removed")


@pytest.mark.slow
def test_a_session_that_nobody_can_drive_any_more_ends_and_leaves_the_quota(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    options = {"sweep_s": 0.1, "driver_silence_s": 0.2}
    service = make_service(store=options, session_idle_timeout_s=0.5, auth="keys")
    text = service.store._credentials.create_key("Ann", sessions=1, frames_per_minute=0, now=time.time(), account="")
    engine.allow(1)
    headers = {"Authorization": f"Bearer {text}"}
    with http_client(service.urls[0], headers) as http:
        video = start(http)
        assert http.post("/v1/videos", json={"prompt": "p"}).json()["error"]["code"] == "session_quota_exceeded"
        for gateway in service.gateways:  # neither one drives it, nor takes it up
            service.run(gateway.close())

        def lost() -> bool:
            record = service.run(service.store.get(video))
            return record is not None and record.status is Status.FAILED and record.error_code == "session_lost"

        until(lost, "ended")
        assert http.post("/v1/videos", json={"prompt": "p"}).status_code == 200


@pytest.mark.slow
def test_finished_files_go_to_s3_and_come_back_from_there(
    make_service: Callable[..., Service], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    for name, value in environment(s3_server.url).items():
        monkeypatch.setenv(name, value)
    with s3_server.bucket() as bucket:
        service = make_service(files=f"s3://{bucket}/videos")
        with http_client(service.urls[0]) as http:
            video = start(http, frames=21)
            until(lambda: status(http, video)["status"] == "completed", "completed")
            there = f"videos/{video}/video.mp4"
            assert [one["Key"] for one in s3_server.client().list_objects_v2(Bucket=bucket)["Contents"]] == [there]
            (Path(service.settings.data) / "videos" / video / "video.mp4").unlink()
            assert len(shades(http.get(f"/v1/videos/{video}/content").content)) == 21
            http.delete(f"/v1/videos/{video}")
            assert "Contents" not in s3_server.client().list_objects_v2(Bucket=bucket)
