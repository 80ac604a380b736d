"""Fault S12 and its kin: two at once, too late, out of order; a key that is revoked, a store that restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.serve.harness import FakeEngine, Service, Until, http_client
from tests.serve.hostile import new_key, start, told
from tests.serve.sockets import Viewer, closed, cut, viewer


def change(prompt: str, event_id: str, chunks: int = 0) -> dict[str, Any]:
    return {"interaction": {"event_id": event_id, "event": {"prompt": prompt}, "transition_chunks": chunks}}


def test_s12_of_one_event_sent_by_many_at_once_one_is_applied(
    service: Service, http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    engine.allow(1)
    video = start(http, num_frames=81)
    until(lambda: told(http, video)["chunks_done"] == 1, "one chunk")

    def say(number: int) -> int:
        with http_client(service.urls[number % 2]) as client:
            prompt = "a blue square" if number < 8 else "a green square"
            return client.post(f"/v1/videos/{video}/interactions", json=change(prompt, "e1")).status_code

    with ThreadPoolExecutor(10) as many:
        codes = sorted(many.map(say, range(10)))
    assert set(codes) <= {202, 409} and 409 in codes and codes.count(202) >= 1
    assert len(engine.sessions[video].pending) == 1
    engine.allow(100)
    until(lambda: told(http, video)["status"] == "completed", "completed")
    (only,) = told(http, video)["interactions"]
    assert (only["status"], only["chunk"]) == ("applied", 1)


def test_s12_changes_are_applied_in_the_order_of_arrival_whatever_their_names(
    service: Service, engine: FakeEngine
) -> None:
    engine.allow(1)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81, extra_params={"pacing": "none"})
        one.read(1)
        names = ["e9", "e1", "e5"]
        for name in [*names, "e1"]:  # the last is sent again, late
            one.say("session.interaction", **change(f"prompt {name}", name))
            one.until("session.interaction.queued")
        engine.allow(100)
        one.until("session.done")
        assert sum((chunk["started_event_ids"] for chunk in one.chunks), []) == names


@pytest.mark.slow
@pytest.mark.parametrize("gateway", [0, 1])
def test_of_two_who_resume_at_once_one_goes_on(service: Service, engine: FakeEngine, gateway: int) -> None:
    engine.allow(2)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81)
        one.read(1)
        cut(one)
    found: list[tuple[Viewer, dict[str, Any]]] = []
    with viewer(service.urls[0]) as two, viewer(service.urls[gateway]) as three:

        def resume(who: Viewer) -> None:
            who.say("session.start", resume_token=one.resume_token)
            found.append((who, who.next()))

        threads = [threading.Thread(target=resume, args=(who,)) for who in (two, three)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        kinds = sorted(message["type"] for _, message in found)
        assert kinds == ["error", "video.start"]
        winner = next(who for who, message in found if message["type"] == "video.start")
        engine.allow(100)
        winner.until("session.done")
        assert winner.indices == list(range(1, 7))
    assert [chunk for _, chunk in engine.made] == list(range(7))


def test_a_session_that_is_deleted_under_its_viewer_ends_with_a_word(
    service: Service, http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    engine.allow(1)
    with viewer(service.urls[1]) as one:
        one.start(num_frames=81)
        one.read(1)
        assert http.delete(f"/v1/videos/{one.request_id}").status_code == 200
        code, error = closed(one)
        assert (code, error["code"]) == (1008, "video_not_found")
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    assert http.delete(f"/v1/videos/{one.request_id}").status_code == 404


def test_a_video_is_deleted_by_one_of_many(service: Service, http: httpx2.Client, engine: FakeEngine) -> None:
    engine.allow(1)
    video = start(http, num_frames=81)
    with ThreadPoolExecutor(8) as many:
        codes = list(many.map(lambda _: httpx2.delete(f"{service.urls[0]}/v1/videos/{video}").status_code, range(8)))
    assert sorted(codes) == [200] + [404] * 7


def test_a_revoked_key_ends_what_it_has_running(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(auth="keys", store={"sweep_s": 0.1})
    headers, others = new_key(service), new_key(service)
    with viewer(service.urls[0], headers) as one, viewer(service.urls[0], others) as other:
        one.start(num_frames=900)
        other.start(num_frames=900)
        one.read(1)
        service.store._credentials.revoke_key(headers["Authorization"].split("_")[1], time.time())
        assert one.until("session.done")["stopped"]
        until(lambda: set(engine.sessions) == {other.request_id}, "its place is free")
        other.read(2)


@pytest.mark.slow
def test_pauses_and_resumes_without_number_make_no_video_slower_to_look_at(
    service: Service, http: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.store.database.KEPT_INTERACTIONS", 16)
    engine.allow(1)
    video = start(http, num_frames=81)
    for number in range(60):
        body = {"interaction": {"event_id": f"e{number}", "event": {"action": ("pause", "resume")[number % 2]}}}
        assert http.post(f"/v1/videos/{video}/interactions", json=body).status_code == 202
    kept = [interaction["event_id"] for interaction in told(http, video)["interactions"]]
    assert len(kept) <= 17 and kept[-1] == "e59" and kept == sorted(kept, key=lambda name: int(name[1:]))


@pytest.mark.slow
def test_interactions_race_with_the_end_and_are_applied_or_dropped_but_never_wait(
    service: Service, http: httpx2.Client, until: Until
) -> None:
    for _ in range(5):
        video = start(http, num_frames=45)
        answers: list[int] = []

        def hurry(video: str = video, answers: list[int] = answers) -> None:
            with http_client(service.urls[1]) as client:
                for number in range(20):
                    path = f"/v1/videos/{video}/interactions"
                    answers.append(client.post(path, json=change("x", f"e{number}")).status_code)

        thread = threading.Thread(target=hurry)
        thread.start()
        until(lambda video=video: told(http, video)["status"] == "completed", "completed")
        thread.join(20)
        assert set(answers) <= {202, 409}
        seen = [interaction["status"] for interaction in told(http, video)["interactions"]]
        assert set(seen) <= {"applied", "dropped"} and len(seen) == answers.count(202)


@pytest.mark.slow
def test_a_store_that_restarts_loses_no_watched_chunk(make_service: Callable[..., Service], engine: FakeEngine) -> None:
    service = make_service(reader_start_timeout_s=10.0)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=81, streaming_buffer_seconds=2.0)
        one.read(2)
        service.run(service.kill_store())
        time.sleep(0.3)
        service.run(service.restart_store())
        one.say("session.playback", position_seconds=100.0)
        one.until("session.done")
    assert one.indices == list(range(7)) and [chunk for _, chunk in engine.made] == list(range(7))


@pytest.mark.slow
def test_a_store_that_follows_another_cancels_no_session_that_never_waits(
    make_service: Callable[..., Service], engine: FakeEngine
) -> None:
    """Its driver hears of readers with each chunk alone, and those of the new store have not asked there yet."""
    service = make_service(reader_start_timeout_s=3.0)
    engine.allow(1)
    with viewer(service.urls[0]) as one:
        one.start(num_frames=321, extra_params={"pacing": "none"})
        one.read(1)
        began_s = time.monotonic()
        while time.monotonic() - began_s < 3.5:  # chunk after chunk, no pull waits in vain
            engine.allow(1)
            one.read(1)
        old = service.store
        service.run(service.restart_store())  # while the viewer's gateway still waits at the old one
        engine.allow(1)
        one.read(1)
        assert service.run(service.store.get(one.request_id)).status == "in_progress"
        engine.allow(100)
        one.until("session.done")
        service.run(old.shut())
    assert one.indices == list(range(27))
