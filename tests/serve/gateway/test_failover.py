"""Replicas that die, pause and come back under running streams: real engines of a small model, real sockets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY, AsyncMock, Mock

import httpx2
import pytest

from serve.gateway.failover import rehome
from serve.records import Interaction, Opened, Refused
from tests.serve.harness import (
    OTHER,
    PROMPT,
    VIDEO,
    Cluster,
    Until,
    assert_same_video,
    decoded,
    http_client,
    start,
    steer,
)
from tests.serve.sockets import cut, viewer


@pytest.mark.slow
@pytest.mark.parametrize("pacing", ["none", "realtime"])
def test_a_replica_that_dies_does_not_end_the_stream(
    make_cluster: Callable[..., Cluster], expected: bytes, pacing: str, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.policies.driving._AHEAD", 1)  # else all of it may have come before the replica dies
    cluster = make_cluster()
    with http_client(cluster.urls[0]) as http:
        video, data, killed = start(http, 105, pacing=pacing), bytearray(), ""
        with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
            for part in answer.iter_raw():
                data += part
                if not killed and http.get(f"/v1/videos/{video}").json()["chunks_done"] >= 2:
                    killed = cluster.kill_holder(video)
        assert_same_video(data, expected)
        told = until(lambda: (v := http.get(f"/v1/videos/{video}").json())["status"] == "completed" and v, "completed")
        assert killed and told["frames_done"] == 105 and cluster.holder(video) != killed
        assert len(decoded(http.get(f"/v1/videos/{video}/content").content)[0]) == 105
        folder = Path(cluster.settings.data) / "videos" / video
        assert not list(folder.glob("snapshot-*")), "snapshots are dropped when they are of no more use"


@pytest.mark.slow
def test_a_realtime_stream_survives_its_replica_without_waiting_for_a_deadline(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster()
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3)
        came: list[float] = []
        while len(one.chunks) < 9:
            if len(one.chunks) == 3 and len(cluster.replicas) == 2:
                cluster.kill_holder(one.request_id)
            one.next()
            came.append(time.monotonic())
        assert one.until("session.done")["chunks"] == 9
    assert one.indices == list(range(9)) and len(decoded(one.video)[0]) == 105
    assert max(later - before for before, later in zip(came, came[1:], strict=False)) < 10, (
        "about two seconds on a calm machine"
    )


@pytest.mark.slow
def test_a_prompt_change_that_no_chunk_had_shown_is_not_lost_with_the_replica(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster()
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3, streaming_buffer_seconds=1.0)
        one.read(2)
        interaction = {"event_id": "e1", "event": {"prompt": OTHER}, "transition_chunks": 0}
        one.say("session.interaction", interaction=interaction)
        one.until("session.interaction.queued")
        cluster.kill_holder(one.request_id)
        one.say("session.playback", position_seconds=100.0)
        one.until("session.done")
    assert [chunk["started_event_ids"] for chunk in one.chunks[:4]].count(["e1"]) == 1
    assert one.indices == list(range(9))


@pytest.mark.slow
def test_a_session_lost_behind_its_first_chunk_begins_again_unnoticed(
    make_cluster: Callable[..., Cluster], expected: bytes
) -> None:
    """The first chunk is shown before anything is kept to go on from; made anew, it is the same context."""
    cluster = make_cluster()
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3, streaming_buffer_seconds=0.25)
        one.read(1)
        assert not list(Path(cluster.settings.data).glob("videos/*/snapshot-*"))
        cluster.kill_holder(one.request_id)
        one.say("session.playback", position_seconds=100.0)
        assert one.until("session.done")["chunks"] == 9
    assert one.indices == list(range(9))
    assert_same_video(one.video, expected)


def test_without_another_replica_the_stream_breaks_off_and_says_so(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.driver.PATIENCE_S", 0.5)
    cluster = make_cluster(replicas=1)
    with http_client(cluster.urls[0]) as http:
        video = start(http, 900, "realtime")
        with pytest.raises(httpx2.RemoteProtocolError), http.stream("GET", f"/v1/videos/{video}/stream") as answer:
            parts = answer.iter_raw()
            next(parts)
            cluster.kill_holder(video)
            list(parts)
        assert http.get(f"/v1/videos/{video}").json()["error"]["code"] == "session_lost"


@pytest.mark.slow
def test_a_replica_that_dies_before_the_first_chunk_is_replaced_too(
    make_cluster: Callable[..., Cluster], expected: bytes
) -> None:
    cluster = make_cluster()
    with http_client(cluster.urls[0]) as http:
        video = start(http, 105, pacing="realtime")
        killer = threading.Thread(target=lambda: cluster.kill_holder(video))
        killer.start()
        stream = http.get(f"/v1/videos/{video}/stream").content
        killer.join(30)
        assert_same_video(stream, expected)


@pytest.mark.slow
def test_a_paused_stream_stands_still_frees_its_cache_and_goes_on(
    make_cluster: Callable[..., Cluster], expected: bytes, until: Until
) -> None:
    cluster = make_cluster(replicas=1)
    engine: Any = cluster.replica._engine
    with http_client(cluster.urls[0]) as http:
        video = start(http, 105, pacing="realtime")
        streams: list[bytes] = []
        reader = threading.Thread(target=lambda: streams.append(http.get(f"/v1/videos/{video}/stream").content))
        reader.start()
        with http_client(cluster.urls[1]) as other:
            until(lambda: other.get(f"/v1/videos/{video}").json()["chunks_done"] >= 2, "two chunks")
            assert steer(other, video, action="pause").status_code == 202
            until(lambda: engine.stats().cache_bytes == 0, "the cache is free", seconds=25)
            done = other.get(f"/v1/videos/{video}").json()
            assert done["paused"] and done["interactions"][0]["kind"] == "pause"
            time.sleep(1.5)
            assert other.get(f"/v1/videos/{video}").json()["chunks_done"] <= done["chunks_done"] + 1
            assert steer(other, video, action="resume").status_code == 202
            reader.join(60)
        assert_same_video(streams[0], expected)
        changes = http.get(f"/v1/videos/{video}").json()["interactions"]
        told = [(change["kind"], change["status"]) for change in changes]
        assert told == [("pause", "applied"), ("resume", "applied")]


@pytest.mark.slow
def test_a_viewer_who_is_away_holds_no_cache_and_finds_his_stream_again(
    make_cluster: Callable[..., Cluster], expected: bytes, until: Until
) -> None:
    cluster = make_cluster(replicas=1)
    engine: Any = cluster.replica._engine
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3)
        one.read(3)
        cut(one)
    until(lambda: engine.stats().cache_bytes == 0, "the cache is free", seconds=25)
    with viewer(cluster.urls[1]) as two:
        two.start(resume_token=one.resume_token)
        two.until("session.done")
    assert one.indices + two.indices == list(range(9))
    assert_same_video(one.video + two.video, expected)


@pytest.mark.slow
def test_a_gateway_that_dies_costs_its_viewer_a_reconnect(
    make_cluster: Callable[..., Cluster], expected: bytes
) -> None:
    cluster = make_cluster(replicas=1)
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3)
        one.read(3)
        cluster.run(cluster.gateways[0].close())
        cut(one)
    with viewer(cluster.urls[1]) as two:
        two.start(resume_token=one.resume_token)
        two.read(1)
        two.until("session.done")
    assert one.indices + two.indices == list(range(9))
    assert_same_video(one.video + two.video, expected)


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ({"action": "stop"}, "interaction.event.action"),
        ({"action": "pause", "prompt": "x"}, "interaction.event.action"),
        ({}, "interaction.event.prompt"),
    ],
)
def test_an_interaction_says_one_thing(http: httpx2.Client, event: dict[str, Any], param: str) -> None:
    answer = steer(http, start(http), **event)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


@pytest.mark.parametrize(("chunks_done", "parts", "told"), [(1, [], ["e0", "e1"]), (3, [b"s"], ["e1"]), (3, [], None)])
def test_a_restarted_session_hears_all_changes_and_a_moved_one_what_waits(
    chunks_done: int, parts: list[bytes], told: list[str] | None
) -> None:
    changes = (Interaction("e0", "a blue square", chunk=0), Interaction("e1", "a green circle"))
    video = replace(VIDEO, interactions=changes, chunks_done=chunks_done)
    held = AsyncMock(return_value=Opened("replica-2", "video/mp4", b"init"))
    store = Mock(snapshots=AsyncMock(return_value=parts), claim=AsyncMock(return_value=video))
    replica = Mock(open=held, restore=held, interact=AsyncMock(return_value=None))
    moved = asyncio.run(rehome(video, store, Mock(at=lambda _: replica), 0.0))
    assert [call.args[1] for call in replica.interact.await_args_list] == (told or [])
    assert moved == (Refused("session_lost", ANY, "snapshot") if told is None else video)
