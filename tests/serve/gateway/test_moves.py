"""Parts that drain, hang or end under running streams: sessions move on, viewers go on through another gateway."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray.exceptions import RayActorError
from websockets.exceptions import ConnectionClosed

from serve.actors import Replicas, remote_store
from serve.gateway.driver import Driver
from serve.records import DriveDecision, Pacing, VideoRecord
from serve.replica.replica import Replica
from tests.recorded_metrics import RecordedMetrics
from tests.serve.harness import PROMPT, Cluster, LocalHandle, Until, assert_same_video, http_client, start
from tests.serve.sockets import Viewer, cut, viewer

Make = Callable[..., Cluster]
CHUNKS = 9


def drain(cluster: Cluster, name: str) -> Replica:
    """What Serve does first with a replica that it stops: routers lose it; calls that it has come to their end."""
    replica = cluster.replicas[name]

    async def lose() -> None:
        del cluster.replicas[name]

    cluster.run(lose())
    return replica


def kill_gateway(cluster: Cluster, number: int) -> None:
    """A gateway's process is gone without a word; its sockets stay with the test's loop, and end with it."""
    drivers = cluster.gateways[number]._drivers

    async def kill() -> None:
        drivers._store._handle._find = lambda _: None  # type: ignore[attr-defined]
        for task in [*drivers._tasks.values(), *cluster.gateways[number]._upkeep]:
            task.cancel()

    cluster.run(kill())


def ended(one: Viewer) -> tuple[dict[str, Any], ConnectionClosed]:
    """The last message of a connection that the server closes, and how it did."""
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            one.next()
    return one.others[-1], closed.value


def gaps(one: Viewer, chunks: int) -> list[float]:
    """Seconds between the next chunks."""
    came = [time.monotonic()]
    for _ in range(chunks):
        one.read(1)
        came.append(time.monotonic())
    return [later - before for before, later in zip(came, came[1:], strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("pacing", ["none", "realtime"])
def test_a_replica_that_drains_loses_no_frame(make_cluster: Make, expected: bytes, pacing: str, until: Until) -> None:
    cluster = make_cluster()
    with http_client(cluster.urls[0]) as http, ThreadPoolExecutor(1) as reader:
        video = start(http, 105, pacing=pacing)
        stream = reader.submit(lambda: http.get(f"/v1/videos/{video}/stream").content)
        until(lambda: cluster.run(cluster.store.get(video)).chunks_done >= 3, "three chunks")
        drained = drain(cluster, cluster.holder(video))
        try:
            assert_same_video(stream.result(60), expected)
        finally:
            cluster.run(drained.shut())


@pytest.mark.slow
def test_a_draining_replicas_session_moves_before_its_viewer_runs_dry(make_cluster: Make, until: Until) -> None:
    cluster = make_cluster()
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=321, seed=3, streaming_buffer_seconds=4.0)
        one.say("session.playback", position_seconds=0.0)
        until(lambda: cluster.run(cluster.store.get(one.request_id)).chunks_done >= 6, "his buffer is full")
        made = cluster.run(cluster.store.get(one.request_id)).chunks_done
        holder = cluster.holder(one.request_id)
        drained = drain(cluster, holder)
        until(lambda: cluster.holder(one.request_id) != holder, "it moved, though no chunk was wanted")
        assert cluster.run(cluster.store.get(one.request_id)).chunks_done == made
        one.say("session.playback", position_seconds=100.0)
        one.until("session.done")
        cluster.run(drained.shut())
    assert one.indices == list(range(27))


@pytest.mark.slow
def test_a_session_that_moves_where_all_is_full_waits_until_there_is_room(
    make_cluster: Make, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.driver.PATIENCE_S", 0.5)
    cluster = make_cluster()
    for replica in cluster.replicas.values():
        engine: Any = replica._engine
        engine.admission.slots = 1
    with http_client(cluster.urls[0]) as http, ThreadPoolExecutor(2) as readers:
        other, video = start(http, frames=57, pacing="realtime"), start(http, 105, pacing="realtime")
        streams = [readers.submit(http.get, f"/v1/videos/{one}/stream") for one in (other, video)]
        killed = cluster.kill_holder(video)
        assert_same_video(streams[1].result(60).content, expected)
        assert streams[0].result(1).content and cluster.holder(video) == cluster.holder(other) != killed


def test_calls_for_a_replica_that_is_gone_end_no_session_that_moved(make_cluster: Make) -> None:
    cluster = make_cluster(replicas=1)
    with http_client(cluster.urls[0]) as http:
        video = start(http, frames=900, pacing="realtime")
        cluster.run(cluster.replica.close(video, "completed", "replica-that-drained"))
        assert cluster.run(cluster.replica.holds(video, "replica-1"))
        assert not cluster.run(cluster.replica.holds(video, "replica-that-drained"))
        cluster.run(cluster.replica.close(video, "completed", "replica-1"))
        assert not cluster.run(cluster.replica.holds(video, "replica-1"))


@pytest.fixture
def hung() -> Iterator[threading.Event]:
    """Set, it lets the engines go on that `hang` stopped."""
    release = threading.Event()
    yield release
    release.set()


def hang(replica: Replica, release: threading.Event) -> None:
    """The engine's next step does not come back."""
    engine: Any = replica._engine
    step = engine.step

    def never() -> Any:
        release.wait(60)
        return step()

    engine.step = never


@pytest.mark.slow
def test_an_engine_that_hangs_is_left_within_its_viewers_patience(
    make_cluster: Make, expected: bytes, hung: threading.Event, until: Until
) -> None:
    cluster = make_cluster()
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3)
        one.read(3)
        holder = cluster.replicas[cluster.holder(one.request_id)]
        hang(holder, hung)
        assert max(gaps(one, CHUNKS - 3)) < 20, "three deadlines, then it is moved"
        one.until("session.done")
        assert cluster.replicas[cluster.holder(one.request_id)] is not holder
        until(lambda: holder._thread.lost, "Serve is told to replace it")
        with pytest.raises(RuntimeError):
            holder.check_health()
    assert_same_video(one.video, expected)


@pytest.mark.slow
def test_an_engine_that_hangs_is_not_ready_and_takes_no_session(
    make_cluster: Make, hung: threading.Event, until: Until
) -> None:
    cluster = make_cluster(replicas=1)
    with http_client(cluster.urls[0]) as http:
        assert http.get("/health/ready").status_code == 200
        hang(cluster.replica, hung)
        until(lambda: http.get("/health/ready").status_code == 503, "not ready")
        refused = http.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 21})
        assert refused.status_code in (429, 503) and int(refused.headers["retry-after"]) > 0


@pytest.mark.slow
def test_a_viewer_of_a_gateway_that_drains_goes_on_through_another_one(make_cluster: Make, expected: bytes) -> None:
    cluster = make_cluster(replicas=1)
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3)
        one.read(6)
        cluster.run(cluster.gateways[0].drain())
        last, closed = ended(one)
        assert last == {"type": "session.draining", "request_id": one.request_id, "resume_token": one.resume_token}
        assert closed.rcvd is not None and closed.rcvd.code == 1012
    with http_client(cluster.urls[0]) as http:
        answer = http.get("/health/ready")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
        assert http.get("/health/live").status_code == 200
    with viewer(cluster.urls[1]) as two:
        two.start(resume_token=last["resume_token"])
        two.until("session.done")
    assert one.indices + two.indices == list(range(CHUNKS))
    assert_same_video(one.video + two.video, expected)


@pytest.mark.slow
def test_a_stream_over_http_through_a_gateway_that_drains_comes_to_its_end(
    make_cluster: Make, expected: bytes, until: Until
) -> None:
    cluster = make_cluster(replicas=1)
    with http_client(cluster.urls[0]) as http, ThreadPoolExecutor(1) as reader:
        video = start(http, 105, pacing="realtime")
        stream = reader.submit(lambda: http.get(f"/v1/videos/{video}/stream").content)
        until(lambda: cluster.run(cluster.store.get(video)).chunks_done >= 3, "three chunks")
        cluster.run(cluster.gateways[0].drain())
        until(lambda: video in cluster.gateways[1]._drivers, "the other gateway drives it")
        assert_same_video(stream.result(60), expected)


@pytest.mark.slow
def test_a_gateway_that_drains_alone_still_brings_its_streams_to_their_end(
    make_cluster: Make, expected: bytes, until: Until
) -> None:
    cluster = make_cluster(replicas=1, gateways=1)
    with http_client(cluster.urls[0]) as http, ThreadPoolExecutor(1) as reader:
        video = start(http, 105, pacing="realtime")
        stream = reader.submit(lambda: http.get(f"/v1/videos/{video}/stream").content)
        until(lambda: cluster.run(cluster.store.get(video)).chunks_done >= 3, "three chunks")
        cluster.run(cluster.gateways[0].drain())
        assert_same_video(stream.result(60), expected)


@pytest.mark.slow
def test_a_viewer_may_come_back_long_after_his_gateway_died_without_a_word(make_cluster: Make, expected: bytes) -> None:
    cluster = make_cluster(replicas=1, resume_window_s=20.0)
    cluster.store._reader_silence_s = 0.5
    with viewer(cluster.urls[0]) as one:
        one.start(prompt=PROMPT, num_frames=105, seed=3)
        one.read(3)
        kill_gateway(cluster, 0)
        cut(one)
    time.sleep(4.0)
    assert not cluster.run(cluster.store.get(one.request_id)).status.over
    with viewer(cluster.urls[1]) as two:
        two.start(resume_token=one.resume_token)
        assert two.until("session.done")["stopped"] is False
    assert one.indices + two.indices == list(range(CHUNKS))
    assert_same_video(one.video + two.video, expected)


@pytest.mark.slow
def test_a_video_that_nobody_watches_outlives_its_gateway(make_cluster: Make, until: Until) -> None:
    cluster = make_cluster(replicas=1)
    with http_client(cluster.urls[0]) as http:
        video = start(http, frames=957)
    kill_gateway(cluster, 0)
    assert not cluster.run(cluster.store.get(video)).whole
    until(lambda: video in cluster.gateways[1]._drivers, "it is taken up without being asked for")
    until(lambda: cluster.run(cluster.store.get(video)).whole, "it is made to its end")


class ForgetfulStore:
    """Knows a reader, is away for longer than a first reader may take to come, and then has to be told of him again."""

    def __init__(self) -> None:
        self.began_s, self.ended = time.monotonic(), list[str]()

    async def check(self, *_: Any) -> DriveDecision:
        since_s = time.monotonic() - self.began_s
        if 0.3 < since_s < 1.5:
            raise RayActorError
        return DriveDecision(go=not self.ended, readers=int(since_s < 0.3 or 1.8 < since_s < 2.1))

    async def end(self, video_id: str, status: Any, code: str, message: str) -> bool:
        self.ended.append(code)
        return True


class SlowReplica:
    """Is never done with a chunk."""

    async def pull(self, *_: Any) -> None:
        await asyncio.sleep(0.05)

    async def holds(self, *_: Any) -> bool:
        return True

    async def close(self, *_: Any) -> None: ...


@pytest.mark.slow
def test_a_store_that_comes_back_is_given_time_to_learn_who_watches() -> None:
    video = VideoRecord("video_1", "m", "p", 1, 960, 16, 1, "32x32", Pacing.REALTIME, 0.0, frames_done=93)

    async def drive() -> None:
        store, replica = ForgetfulStore(), SlowReplica()
        at = remote_store(LocalHandle(lambda _: store)), Replicas(LocalHandle(lambda _: replica))
        running = asyncio.ensure_future(Driver(video, *at, RecordedMetrics(), 1.0, 0.6).run())
        await asyncio.sleep(2.2)
        assert not store.ended, "its reader asked again in time"
        await asyncio.wait_for(running, 5)
        assert store.ended == ["abandoned"], "nobody reads any more"

    asyncio.run(drive())
