"""Streams over real sockets: each chunk made once and sent at once, to whoever asks, wherever he asks."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

import av
import httpx2
import pytest
from ray.exceptions import RayActorError

from diagonal.mp4 import FREE, PartReader, boxes
from tests.serve.harness import FakeEngine, Service, Until, fragments, http_client, shade, shades, start, status


def test_the_stream_is_the_whole_video_frame_by_frame(http: httpx2.Client) -> None:
    answer = http.get(f"/v1/videos/{start(http)}/stream")
    assert answer.headers["content-type"] == "video/mp4" and "content-length" not in answer.headers
    assert [name for name, _, _ in boxes(answer.content)] == ["ftyp", "moov"] + ["moof", "mdat"] * 7
    assert len(shades(answer.content)) == 81


def test_the_first_bytes_come_before_the_video_is_done(http: httpx2.Client, engine: FakeEngine) -> None:
    engine.allow(1)
    video, data = start(http), bytearray()
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        names = fragments(answer.iter_raw(), data)
        assert [next(names) for _ in range(4)] == ["ftyp", "moov", "moof", "mdat"]
        assert status(http, video)["frames_done"] == 9 and len(engine.made) == 1
        engine.allow(100)
        assert list(names) == ["moof", "mdat"] * 6
    assert len(shades(bytes(data))) == 81


@pytest.mark.slow
def test_a_late_reader_and_a_reader_elsewhere_get_all_chunks_and_each_was_made_once(
    http: httpx2.Client, other_http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    engine.allow(3)
    video = start(http)
    until(lambda: status(http, video)["chunks_done"] == 3, "three chunks")
    streams: list[bytes] = []
    threads = [
        threading.Thread(target=lambda c=client: streams.append(c.get(f"/v1/videos/{video}/stream").content))
        for client in (http, other_http)
    ]
    for thread in threads:
        thread.start()
    engine.allow(100)
    for thread in threads:
        thread.join(20)
    streams.append(other_http.get(f"/v1/videos/{video}/stream").content)
    assert streams[0] == streams[1] == streams[2] and len(shades(streams[0])) == 81
    assert [chunk for _, chunk in engine.made] == list(range(7))


def test_any_gateway_tells_and_gives_any_video(http: httpx2.Client, other_http: httpx2.Client, until: Until) -> None:
    video = start(http)
    until(lambda: status(other_http, video)["status"] == "completed", "completed")
    contents = [client.get(f"/v1/videos/{video}/content").content for client in (http, other_http)]
    assert contents[0] == contents[1] and len(shades(contents[0])) == 81


def test_a_reader_may_begin_at_a_later_chunk(http: httpx2.Client) -> None:
    answer = http.get(f"/v1/videos/{start(http)}/stream", params={"start_chunk": 5})
    assert [name for name, _, _ in boxes(answer.content)] == ["ftyp", "moov"] + ["moof", "mdat"] * 2
    with av.open(io.BytesIO(answer.content), mode="r") as container:
        assert round(float(next(container.decode(video=0)).time or 0) * 16) == 57


def test_a_prompt_change_shows_from_the_next_chunk_on(http: httpx2.Client, engine: FakeEngine, until: Until) -> None:
    engine.allow(2)
    video = start(http, prompt="a red circle")
    until(lambda: status(http, video)["chunks_done"] == 2, "two chunks")
    body = {"interaction": {"event_id": "e1", "event": {"prompt": "a blue square"}, "transition_chunks": 0}}
    answer = http.post(f"/v1/videos/{video}/interactions", json=body)
    assert (answer.status_code, answer.json()["type"]) == (202, "session.interaction.queued")
    change = {"event_id": "e1", "kind": "prompt", "transition_chunks": 0}
    change |= {"status": "queued", "chunk": None, "pixel_frame": None, "made_by": None}
    assert status(http, video)["interactions"] == [change]
    engine.allow(100)
    seen = shades(http.get(f"/v1/videos/{video}/stream").content)
    assert {abs(grey - shade("a red circle")) <= 2 for grey in seen[:21]} == {True}
    assert {abs(grey - shade("a blue square")) <= 2 for grey in seen[21:]} == {True}
    applied = change | {"status": "applied", "chunk": 2, "pixel_frame": 21}
    assert status(http, video)["interactions"] == [applied]


def test_the_same_event_again_is_a_retry_and_with_other_content_a_conflict(
    http: httpx2.Client, engine: FakeEngine
) -> None:
    engine.allow(0)
    video = start(http)
    path = f"/v1/videos/{video}/interactions"
    body = {"interaction": {"event_id": "e1", "event": {"prompt": "a blue square"}}}
    assert [http.post(path, json=body).status_code for _ in range(2)] == [202, 202]
    assert len(engine.sessions[video].pending) == 1
    other = {"interaction": {"event_id": "e1", "event": {"prompt": "a green square"}}}
    answer = http.post(path, json=other)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "event_id_conflict")


def test_a_finished_video_takes_no_prompt_change(http: httpx2.Client, until: Until) -> None:
    video = start(http, frames=1)
    until(lambda: status(http, video)["status"] == "completed", "completed")
    body = {"interaction": {"event": {"prompt": "a blue square"}}}
    answer = http.post(f"/v1/videos/{video}/interactions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_over")


@pytest.mark.parametrize(
    ("interaction", "param"),
    [
        ({"event": {"prompt": " "}}, "interaction.event.prompt"),
        ({"event": {"prompt": "x" * 201}}, "interaction.event.prompt"),
        ({"event": {"prompt": 1}}, "interaction.event.prompt"),
        ({"event": {}}, "interaction.event.prompt"),
        ({"event_id": "", "event": {"prompt": "x"}}, "interaction.event_id"),
        ({"event_id": "a\nb", "event": {"prompt": "x"}}, "interaction.event_id"),
        ({"transition_chunks": -1, "event": {"prompt": "x"}}, "interaction.transition_chunks"),
        ({"transition_chunks": 65, "event": {"prompt": "x"}}, "interaction.transition_chunks"),
        ({"event": {"prompt": "x"}, "speed": 1}, "interaction.speed"),
    ],
)
def test_a_wrong_prompt_change_is_told_its_field(
    http: httpx2.Client, engine: FakeEngine, interaction: dict[str, Any], param: str
) -> None:
    engine.allow(0)
    answer = http.post(f"/v1/videos/{start(http)}/interactions", json={"interaction": interaction})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_a_video_that_fails_cuts_the_stream_and_tells_nothing_of_the_inside(
    http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    engine.fail_at = 2
    video, data = start(http), bytearray()
    with pytest.raises(httpx2.RemoteProtocolError), http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        for part in answer.iter_raw():
            data += part
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    told = status(http, video)
    assert (told["status"], told["error"]["code"], told["frames_done"]) == ("failed", "generation_failed", 21)
    assert "SECRET_X" not in str(told)
    assert http.get(f"/v1/videos/{video}/content").status_code == 409


def test_a_replica_that_dies_cuts_the_stream_and_fails_the_video(
    http: httpx2.Client, engine: FakeEngine, service: Service, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dead(*_: object) -> None:
        raise RayActorError

    engine.allow(2)
    video = start(http)
    with pytest.raises(httpx2.RemoteProtocolError), http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        parts = answer.iter_raw()
        next(parts)
        until(lambda: status(http, video)["chunks_done"] == 2, "two chunks, behind which nothing is kept to go on from")
        monkeypatch.setattr(service.replica, "pull", dead)
        engine.allow(100)
        list(parts)
    assert status(http, video)["error"]["code"] == "session_lost"


@pytest.mark.parametrize("codec", ["vp9", "av1"])
def test_the_other_codecs_stream_as_well(make_service: Callable[..., Service], codec: str) -> None:
    service = make_service(codec=codec)
    with http_client(service.urls[0]) as http:
        video = start(http, frames=33)
        assert len(shades(http.get(f"/v1/videos/{video}/stream").content)) == 33
        assert {"vp9": "vp09", "av1": "av01"}[codec] in status(http, video)["mime"]


def test_one_failed_video_leaves_the_others_alone(http: httpx2.Client, engine: FakeEngine, until: Until) -> None:
    engine.allow(0)
    short, long = start(http, frames=21), start(http, frames=81)
    engine.fail_at = 3
    engine.allow(100)
    until(lambda: status(http, short)["status"] == "completed", "the short one is whole")
    until(lambda: status(http, long)["status"] == "failed", "the long one failed")
    assert len(shades(http.get(f"/v1/videos/{short}/content").content)) == 21
    assert http.get(f"/v1/videos/{long}/content").status_code != 200


@pytest.mark.slow
def test_realtime_generation_stays_a_lead_ahead_of_who_watches(http: httpx2.Client, engine: FakeEngine) -> None:
    video = start(http, frames=160, pacing="realtime")
    began = time.monotonic()
    ahead, asked = list[float](), list[float]()
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        for _ in answer.iter_raw():
            now_s, chunks = time.monotonic() - began, len(engine.made)
            ahead.append((12 * chunks - 3) / 16 - now_s)
            asked.append((12 * (engine.sessions[video].wanted + 1) - 3) / 16 - now_s)
            if time.monotonic() - began > 3:
                break
    assert max(ahead) <= 1.0 + 0.75 + 0.35  # the lead, the chunk that it lets in, and what a busy machine adds
    assert min(asked) > 0, "what is played next was asked for before"


@pytest.mark.slow
def test_a_viewer_with_something_to_play_leaves_the_engine_to_who_has_nothing(
    http: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk is asked for when 0.4 of the first one's 0.56 s are left."""
    made_s, make = list[float](), engine._make

    def timed(session: Any) -> Any:
        made_s.append(time.monotonic())
        return make(session)

    monkeypatch.setattr(engine, "_make", timed)
    engine.allow(0)
    video = start(http, pacing="realtime")
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        engine.allow(100)
        names = fragments(answer.iter_raw(), bytearray())
        while len(made_s) < 2:
            next(names)
    assert made_s[1] - made_s[0] > 0.15


@pytest.mark.slow
def test_nobody_watching_a_realtime_video_means_no_more_of_it(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(reader_start_timeout_s=60.0, resume_window_s=1.0)
    with http_client(service.urls[0]) as http:
        video = start(http, frames=900, pacing="realtime")
        with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
            next(answer.iter_raw())
        made = len(engine.made)
        until(lambda: not engine.sessions, "the place is free", seconds=25)
        until(lambda: status(http, video)["status"] == "cancelled", "over, as nobody came back")
        assert len(engine.made) - made <= 3


def test_a_reader_who_was_cut_off_comes_back_within_the_window_and_goes_on(
    make_service: Callable[..., Service], engine: FakeEngine
) -> None:
    service = make_service(resume_window_s=30.0)
    with http_client(service.urls[0]) as http:
        video = start(http, frames=81, pacing="realtime")
        with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
            parts = PartReader()
            first = next(part for data in answer.iter_raw() for part in parts.feed(data))
        time.sleep(2.0)
        assert status(http, video)["status"] == "in_progress"
        whole = http.get(f"/v1/videos/{video}/stream").content
        assert whole.startswith(first) and len(shades(whole)) == 81


def test_a_paused_stream_says_now_and_then_that_it_lives(
    http: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.reader._KEEPALIVE_S", 0.2)
    engine.allow(1)
    video = start(http, frames=21)
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        arrived, raw = b"", answer.iter_raw()
        while arrived.count(FREE) < 3:
            arrived += next(raw)
        engine.allow(100)
        arrived += b"".join(raw)
    parts = [part for part in PartReader().feed(arrived)]
    assert len(parts) == 3 and FREE not in b"".join(parts), "what is signed is what was made"
    assert len(shades(arrived)) == 21, "players pass over the empty boxes"


@pytest.mark.slow
def test_a_realtime_video_goes_on_while_one_reader_is_left(
    http: httpx2.Client, other_http: httpx2.Client, engine: FakeEngine
) -> None:
    video = start(http, frames=900, pacing="realtime")
    with other_http.stream("GET", f"/v1/videos/{video}/stream") as kept:
        parts = kept.iter_raw()
        next(parts)
        with http.stream("GET", f"/v1/videos/{video}/stream") as left:
            next(left.iter_raw())
        chunks = len(engine.made)
        while len(engine.made) < chunks + 2:
            next(parts)
        assert status(http, video)["status"] == "in_progress"


@pytest.mark.slow
def test_a_realtime_video_that_nobody_ever_watches_is_given_up(
    http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    video = start(http, frames=900, pacing="realtime")
    until(lambda: status(http, video)["status"] == "cancelled", "given up")
    assert status(http, video)["error"]["code"] == "abandoned" and len(engine.made) <= 3


@pytest.mark.slow
def test_a_watched_chunk_costs_the_store_one_question_beside_its_keeping(service: Service, http: httpx2.Client) -> None:
    check, put = service.store.check, service.store.put_chunks
    asked: list[str] = []
    kept: list[str] = []

    async def counted_check(*arguments: Any) -> Any:
        asked.append(arguments[0])
        return await check(*arguments)

    async def counted_put(*arguments: Any) -> Any:
        kept.append(arguments[0])
        return await put(*arguments)

    service.store.check, service.store.put_chunks = counted_check, counted_put
    video = start(http, frames=81, pacing="realtime")
    assert len(shades(http.get(f"/v1/videos/{video}/stream", timeout=30).content)) == 81
    questions = len(asked) - len(kept)  # to keep a chunk is to look at its video, too
    assert len(kept) == 7 and questions <= 7 + 4, questions


def test_a_disconnect_does_not_end_a_video_that_is_made_for_its_file(http: httpx2.Client, until: Until) -> None:
    video = start(http)
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        next(answer.iter_raw())
    until(lambda: status(http, video)["status"] == "completed", "completed")
    assert len(shades(http.get(f"/v1/videos/{video}/content").content)) == 81


def test_deleting_a_video_ends_its_streams(
    http: httpx2.Client, other_http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    engine.allow(1)
    video = start(http)
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        parts, received = answer.iter_raw(), b""
        while b"moof" not in received:
            received += next(parts)
        other_http.delete(f"/v1/videos/{video}")
        rest = b"".join(parts)
    assert b"moof" not in rest, "no chunk comes after it"
    until(lambda: not engine.sessions, "its place is free")


@pytest.mark.slow
def test_a_video_of_a_gateway_that_died_is_taken_over_by_whoever_is_asked(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(store={"driver_silence_s": 0.6})
    with http_client(service.urls[0]) as first, http_client(service.urls[1]) as second:
        engine.allow(2)
        video = start(first)
        until(lambda: status(second, video)["chunks_done"] == 2, "two chunks")
        service.run(service.gateways[0].close())
        engine.allow(100)
        stream = second.get(f"/v1/videos/{video}/stream", timeout=60).content
        assert len(shades(stream)) == 81
        assert [chunk for _, chunk in engine.made] == list(range(7))


@pytest.mark.slow
def test_a_session_that_its_gateways_forgot_is_freed(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(session_idle_timeout_s=0.3)
    with http_client(service.urls[0]) as http:
        engine.allow(1)
        start(http)
        until(lambda: len(engine.made) == 1, "one chunk")
        service.run(service.gateways[0].close())
        until(lambda: not engine.sessions, "the place is free", seconds=25)
    assert {"outcome": "abandoned"} in service.metrics.labels("diagonal_sessions_total")


def test_what_was_sent_is_counted(http: httpx2.Client, service: Service, until: Until) -> None:
    http.get(f"/v1/videos/{start(http)}/stream")
    values = service.metrics.values
    until(lambda: values("diagonal_sessions_total") == [1.0], "the session is counted")
    assert sum(values("diagonal_frames_sent_total")) == 81
    assert sum(values("diagonal_stream_media_seconds_total")) == pytest.approx(81 / 16)
    assert len(values("diagonal_time_to_first_frame_seconds")) == 1
    assert len(values("diagonal_chunk_encode_seconds")) == 7
    assert service.metrics.labels("diagonal_sessions_total") == [{"outcome": "completed"}]
