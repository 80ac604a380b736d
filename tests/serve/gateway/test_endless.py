"""Streams without an end: they go on until somebody stops them, cost what they make, and fill no disk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serve.records import KEPT_CHUNKS
from tests.serve.harness import Cluster, FakeEngine, Keyed, Service, Until, decoded, first_s, http_client, shades
from tests.serve.sockets import cut, viewer

ENDLESS: dict[str, Any] = {"extra": {"endless": True}, "size": "32x32"}
FAR_S = 1e6  # a viewer who says that he is there gets chunks as fast as they are made


def made_by(service: Service, chunks: int) -> Any:
    """A viewer who has read so many chunks of an endless stream, and left with a broken connection."""
    with viewer(service.urls[0]) as one:
        one.start(streaming_buffer_seconds=1.0, **ENDLESS)
        one.say("session.playback", position_seconds=FAR_S)
        one.read(chunks)
        cut(one)
    return one


@pytest.mark.slow
def test_it_goes_on_past_the_longest_file_until_it_is_stopped(
    service: Service, http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    longest = http.get("/v1/models").json()["data"][0]["limits"]["max_frames"]
    with viewer(service.urls[0]) as one:
        config = one.start(streaming_buffer_seconds=1.0, **ENDLESS)["config"]
        assert config["num_frames"] is None and config["extra_params"] == {"pacing": "realtime", "endless": True}
        one.say("session.playback", position_seconds=FAR_S)
        one.read(longest // 12 + 4)
        video = http.get(f"/v1/videos/{one.request_id}").json()
        assert (video["num_frames"], video["seconds"], video["endless"], video["progress"]) == (None, None, True, 0)
        assert video["frames_done"] > longest
        one.say("session.stop")
        assert one.until("session.done")["stopped"]
    assert one.indices == list(range(len(one.chunks)))
    assert len(shades(one.video)) == sum(chunk["num_frames"] for chunk in one.chunks)
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    gone = http.get(f"/v1/videos/{one.request_id}/content")
    assert (gone.status_code, gone.json()["error"]["code"]) == (409, "no_file")


@pytest.mark.slow
def test_of_its_chunks_the_newest_alone_are_kept(
    service: Service, http: httpx2.Client, other_http: httpx2.Client, until: Until
) -> None:
    one = made_by(service, 2 * KEPT_CHUNKS)
    done = int(http.get(f"/v1/videos/{one.request_id}").json()["chunks_done"])
    files = list((Path(service.settings.data) / "videos" / one.request_id).iterdir())
    assert len([file for file in files if "snapshot" not in file.name]) <= KEPT_CHUNKS + 9 < done  # with `init`
    old = other_http.get(f"/v1/videos/{one.request_id}/stream", params={"start_chunk": 1})
    assert (old.status_code, old.json()["error"]["code"], old.json()["error"]["param"]) == (
        410,
        "chunk_gone",
        "start_chunk",
    )
    with viewer(service.urls[1]) as two:
        two.start(resume_token=one.resume_token, streaming_buffer_seconds=1.0)
        two.say("session.playback", position_seconds=FAR_S)
        two.read(1)
        assert two.indices == [2 * KEPT_CHUNKS]
    links = http.get(f"/v1/videos/{one.request_id}/chain").json()["links"]
    assert [link["chunk"] for link in links[: 2 * KEPT_CHUNKS]] == list(range(2 * KEPT_CHUNKS))  # proofs stay


@pytest.mark.slow
def test_a_resume_token_of_a_chunk_that_is_gone_is_told_so(service: Service) -> None:
    one = made_by(service, KEPT_CHUNKS + 20)
    with viewer(service.urls[1]) as two:
        two.start(resume_token=f"{one.resume_token.rpartition('.')[0]}.3", streaming_buffer_seconds=1.0)
        assert two.until("error")["code"] == "chunk_gone"


def test_who_comes_later_sees_the_newest_chunk_first_and_is_cut_off_by_its_removal(
    service: Service, http: httpx2.Client, other_http: httpx2.Client, engine: FakeEngine
) -> None:
    with viewer(service.urls[0]) as one:
        one.start(streaming_buffer_seconds=1.0, **ENDLESS)
        one.say("session.playback", position_seconds=FAR_S)
        one.read(30)
        with http.stream("GET", f"/v1/videos/{one.request_id}/stream") as answer:
            assert answer.status_code == 200, answer.read()
            parts, data = answer.iter_raw(), b""
            while data.count(b"mdat") < 2:
                data += next(parts)
            assert first_s(data) >= 29 * 0.75 - 3 / 16
            assert other_http.delete(f"/v1/videos/{one.request_id}").json()["deleted"]
            assert b"".join(parts) is not None  # it ends


@pytest.mark.slow
def test_nobody_watching_ends_it(make_service: Callable[..., Service], engine: FakeEngine, until: Until) -> None:
    service = make_service(reader_start_timeout_s=0.4, resume_window_s=0.4)
    with http_client(service.urls[0]) as http:
        video = http.post("/v1/videos", json={"prompt": "a red circle", **ENDLESS}).json()
        assert (video["pacing"], video["endless"]) == ("realtime", True)
        until(lambda: http.get(f"/v1/videos/{video['id']}").json()["status"] == "cancelled", "abandoned")
        made_by(service, 3)
        until(lambda: not engine.sessions, "the place is free", seconds=25)


def test_the_services_limit_ends_it_as_a_stream_that_is_over(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(max_stream_s=3.0)
    with http_client(service.urls[0]) as http:
        assert http.get("/v1/models").json()["data"][0]["limits"]["max_stream_seconds"] == 3.0
        with viewer(service.urls[0]) as one:
            one.start(streaming_buffer_seconds=1.0, **ENDLESS)
            one.say("session.playback", position_seconds=FAR_S)
            told = [one.next() for _ in range(6)]
            assert told[-1]["type"] == "session.done" and told[-1]["stopped"] is False
        assert sum(chunk["num_frames"] for chunk in one.chunks) == 9 + 4 * 12  # the chunk in which it is reached
        assert http.get(f"/v1/videos/{one.request_id}").json()["status"] == "completed"
    until(lambda: not engine.sessions, "the place is free", seconds=25)


@pytest.mark.slow
def test_it_counts_among_a_keys_videos_and_is_charged_as_it_goes(guarded: Service, key: Keyed) -> None:
    mine = key(sessions=1, frames_per_minute=61 * 16)
    with http_client(guarded.urls[0], mine) as http, viewer(guarded.urls[0], mine) as one:
        one.start(streaming_buffer_seconds=1.0, **ENDLESS)
        one.say("session.playback", position_seconds=FAR_S)
        one.read(3)
        refused = http.post("/v1/videos", json={"prompt": "x", "num_frames": 1})
        assert refused.json()["error"]["code"] == "session_quota_exceeded"
        one.read(62 * 16 // 12)  # more than the minute that it was charged at once
        one.say("session.stop")
        one.until("session.done")
        refused = http.post("/v1/videos", json={"prompt": "x", "num_frames": 1})
        assert refused.json()["error"]["code"] == "frame_quota_exceeded"


@pytest.mark.slow
def test_it_goes_on_when_its_replica_dies(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    with viewer(cluster.urls[0]) as one:
        one.start(streaming_buffer_seconds=1.0, seed=3, extra=ENDLESS["extra"])
        one.say("session.playback", position_seconds=FAR_S)
        one.read(4)
        cluster.kill_holder(one.request_id)
        one.read(6)
    assert one.indices == list(range(len(one.chunks)))
    times = decoded(one.video)[1]
    assert len(times) == 9 + 12 * (len(one.chunks) - 1)
    assert len({later - earlier for earlier, later in pairwise(times)}) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra": {"endless": True}, "num_frames": 9}, "extra"),
        ({"extra": {"endless": True}, "seconds": "2"}, "extra"),
        ({"extra": {"endless": True, "pacing": "none"}}, "extra"),
        ({"extra": {"endless": "yes"}}, "extra.endless"),
    ],
)
def test_a_wish_that_contradicts_itself_is_refused(idle_http: httpx2.Client, fields: Any, param: str) -> None:
    answer = idle_http.post("/v1/videos", json={"prompt": "a red circle", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
