"""Recordings: the log of a video, for who asked for it and owns it, from which it can be made again."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
import pytest

from diagonal.engine.recording import Recording
from diagonal.engine.replay import replay
from diagonal.media.encode import ChunkEncoder
from tests.networks import small_release
from tests.serve.harness import OTHER, PROMPT, Cluster, Until, http_client, steer
from tests.serve.sockets import viewer


def start(http: httpx2.Client, frames: int, record: bool = True, pacing: str = "none") -> str:
    extra = {"pacing": pacing, "record": record}
    body = {"prompt": PROMPT, "num_frames": frames, "seed": 3, "extra": extra}
    return str(http.post("/v1/videos", json=body).raise_for_status().json()["id"])


def completed(http: httpx2.Client, video: str, until: Until) -> None:
    until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed", "completed")


def pictures(stream: bytes) -> Any:
    with av.open(io.BytesIO(stream), mode="r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def again(text: str, scale: int) -> bytes:
    release, recording = small_release(), Recording.from_json(text)
    geometry = release.config.geometry
    encoder = ChunkEncoder(geometry.pixel_height, geometry.pixel_width, geometry.pixel_fps, scale=scale)
    made = [encoder.encode_chunk(one.pixels.numpy()) for one in replay(release, recording)]
    return b"".join((encoder.init_segment(), *made))


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster()


@pytest.fixture
def http(cluster: Cluster) -> Any:
    with http_client(cluster.urls[0]) as client:
        yield client


def test_a_steered_video_is_made_again_from_its_log(cluster: Cluster, http: httpx2.Client, until: Until) -> None:
    video = start(http, 69, pacing="realtime")
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        parts = answer.iter_raw()
        shown = [next(parts), next(parts)]
        assert steer(http, video, prompt=OTHER).status_code == 202
        shown += parts
    completed(http, video, until)
    text = http.get(f"/v1/videos/{video}/recording").raise_for_status().text
    kinds = [event.kind for event in Recording.from_json(text).events]
    assert "prompt" in kinds
    seen = pictures(b"".join(shown))
    assert len(seen) == 69
    scale = seen.shape[1] // small_release().config.geometry.pixel_height
    assert np.array_equal(pictures(again(text, scale)), seen)


def test_the_log_goes_on_when_the_replica_dies(cluster: Cluster, http: httpx2.Client, until: Until) -> None:
    video = start(http, 105, pacing="realtime")
    with http.stream("GET", f"/v1/videos/{video}/stream") as answer:
        parts = answer.iter_raw()
        [next(parts) for _ in range(3)]
        cluster.kill_holder(video)
        list(parts)
    completed(http, video, until)
    recording = Recording.from_json(http.get(f"/v1/videos/{video}/recording").raise_for_status().text)
    assert recording.chunks == http.get(f"/v1/videos/{video}").json()["chunks_done"]
    assert "restore" in [event.kind for event in recording.events]


def test_a_stream_that_was_stopped_leaves_the_log_of_what_it_showed(cluster: Cluster, http: httpx2.Client) -> None:
    with viewer(cluster.urls[0]) as one:
        one.start(num_frames=900, extra_params={"record": True})
        one.read(2)
        one.say("session.stop")
        one.until("session.done")
    recording = Recording.from_json(http.get(f"/v1/videos/{one.request_id}/recording").raise_for_status().text)
    assert recording.chunks >= len(one.chunks)


def test_a_log_is_kept_for_who_asked_only_and_goes_with_the_video(
    cluster: Cluster, http: httpx2.Client, until: Until
) -> None:
    plain, recorded = start(http, 9, record=False), start(http, 9)
    for video in (plain, recorded):
        completed(http, video, until)
    assert http.get(f"/v1/videos/{plain}/recording").json()["error"]["code"] == "no_recording"
    folder = Path(cluster.settings.data) / "videos"
    assert [path.parent.name for path in folder.rglob("recording.json")] == [recorded]
    http.delete(f"/v1/videos/{recorded}")
    assert http.get(f"/v1/videos/{recorded}/recording").status_code == 404
    until(lambda: not list(folder.rglob("recording.json")), "the log is gone")
