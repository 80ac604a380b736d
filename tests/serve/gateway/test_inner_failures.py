"""Threats 11 and 15, faults S5, S6, S13 and S14: what breaks inside ends what it must, at once, and tells nothing."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray.exceptions import RayActorError
from websockets.exceptions import ConnectionClosed

from diagonal.metrics import FactoryBackend
from diagonal.model.cache import PoolExhaustedError
from diagonal.storage import StorageError
from serve.gateway.failover import rehome
from serve.rpc import CALL_TIMEOUT_S, call_with_retry
from tests.engine.driving import PoisonedText
from tests.networks import small_release
from tests.serve.harness import Cluster, FakeEngine, Service, Until, http_client, shades
from tests.serve.hostile import start, told
from tests.serve.sockets import closed, viewer

SECRET = "SECRET_X"
CANARY = "CANARY\n\x1b[31mlevel=ERROR"


def raises(error: type[Exception] = RuntimeError) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise error(f"{SECRET} {CANARY}")

    return broken


def raises_later(error: type[Exception] = RuntimeError) -> Callable[..., Any]:
    async def broken(*_: Any, **__: Any) -> Any:
        raise error(f"{SECRET} {CANARY}")

    return broken


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas whose text encoder fails on the prompt `right`, and makes numbers that are none of `moves`."""

    def release() -> Any:
        made = small_release()
        made.encoder = PoisonedText(made.encoder)
        return made

    monkeypatch.setattr("tests.serve.harness.small_release", release)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that answers with an error is asked again for a second, not for twenty."""
    monkeypatch.setattr(call_with_retry, "__defaults__", (CALL_TIMEOUT_S, 1.0))
    monkeypatch.setattr(rehome, "__defaults__", (1.0, False))


SEAMS: dict[str, Callable[[Service, pytest.MonkeyPatch], None]] = {
    "engine opens": lambda s, m: m.setattr(s.engine, "open", raises()),
    "engine steps": lambda s, m: m.setattr(s.engine, "_make", raises()),
    "engine takes a request": lambda s, m: m.setattr(s.engine, "request", raises()),
    "encoder": lambda s, m: m.setattr("serve.replica.replica._encode_chunk", raises()),
    "replica opens": lambda s, m: m.setattr(s.replica, "open", raises_later()),
    "replica is pulled": lambda s, m: m.setattr(s.replica, "pull", raises_later()),
    "store admits": lambda s, m: m.setattr(s.store, "admit", raises_later()),
    "store opens": lambda s, m: m.setattr(s.store, "opened", raises_later()),
    "store keeps a chunk": lambda s, m: m.setattr(s.store, "put_chunks", raises_later()),
    "store gives a chunk": lambda s, m: m.setattr(s.store, "segment", raises_later()),
    "store is asked": lambda s, m: m.setattr(s.store, "get", raises_later()),
    "disk is full": lambda s, m: m.setattr(s.store._files, "put", raises(OSError)),
    "database is locked": lambda s, m: m.setattr(s.store._database, "get", raises(KeyError)),
}


@pytest.mark.slow
@pytest.mark.parametrize("seam", SEAMS)
def test_15_whatever_breaks_inside_is_neither_told_nor_logged_nor_waited_for(
    service: Service,
    http: httpx2.Client,
    monkeypatch: pytest.MonkeyPatch,
    seam: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG", logger="ray.serve")
    answers: list[str] = []
    with monkeypatch.context() as broken:
        SEAMS[seam](service, broken)
        answer = http.post("/v1/videos", json={"prompt": CANARY, "num_frames": 21}, timeout=15)
        answers.append(answer.text + str(answer.headers))
        if answer.status_code == 200:
            video = answer.json()["id"]
            for path in (f"/v1/videos/{video}", f"/v1/videos/{video}/content", "/v1/videos", "/health/ready"):
                answers.append(http.get(path, timeout=15).text.replace(CANARY, ""))
            try:
                http.get(f"/v1/videos/{video}/stream", timeout=8)
            except (httpx2.RemoteProtocolError, httpx2.ReadTimeout) as error:
                answers.append(str(error))
        else:
            assert answer.status_code in (500, 503) and answer.headers["x-request-id"]
        with viewer(service.urls[0]) as one:
            one.say("session.start", prompt="x", num_frames=21, extra_params={"pacing": "none"})
            try:
                while True:
                    one.next()
            except (ConnectionClosed, TimeoutError):
                answers.append(str(one.others))
    everything = "".join(answers).replace(CANARY, "") + caplog.text + "".join(capfd.readouterr())
    assert SECRET not in everything and "CANARY" not in caplog.text


def test_15_a_start_that_breaks_in_the_gateway_ends_with_a_word(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(service.gateways[0], "create", raises_later(KeyError))
    with viewer(service.urls[0]) as one:
        one.say("session.start", prompt=CANARY)
        code, error = closed(one)
    assert (code, error["code"]) == (1011, "internal_error")
    assert SECRET not in str(one.others) + caplog.text and "CANARY" not in caplog.text


def test_s5_a_chunk_that_cannot_be_encoded_ends_its_session_at_once_and_no_other(
    service: Service, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    from serve.replica import replica

    encode = replica._encode_chunk
    calls: list[int] = []

    def third_fails(encoder: Any, result: Any) -> bytes:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(SECRET)
        return encode(encoder, result)

    monkeypatch.setattr(replica, "_encode_chunk", third_fails)
    bad = start(http, num_frames=81)
    until(lambda: told(http, bad)["status"] == "failed", "failed")
    assert told(http, bad)["error"]["code"] == "generation_failed"
    good = start(http)
    until(lambda: told(http, good)["status"] == "completed", "completed")


@pytest.mark.slow
def test_s5_poison_prompts_cost_their_sessions_and_not_the_replica(
    poisoned: None,
    make_cluster: Callable[..., Cluster],
    until: Until,  # noqa: F811
) -> None:
    """Over real engines: whoever sends poison can neither end a neighbour's stream nor have the replica replaced."""
    cluster = make_cluster(replicas=1)
    with http_client(cluster.urls[0]) as http:
        with viewer(cluster.urls[0]) as neighbour:
            neighbour.start(prompt="a red circle", num_frames=105, seed=3)
            neighbour.read(2)
            for prompt in ("right", "moves", "right", "right"):
                bad = start(http, prompt=prompt)
                until(lambda bad=bad: told(http, bad)["status"] == "failed", "failed")
                assert told(http, bad)["error"]["code"] == "generation_failed"
                until(lambda: cluster.replica._engine.stats().free_slots > 0, "its place is free")
            assert neighbour.until("session.done")["chunks"] == 9
        cluster.replica.check_health()
        assert http.get("/health/ready").status_code == 200


def test_s5_a_replica_whose_chunks_all_fail_says_that_it_is_to_be_replaced(
    make_cluster: Callable[..., Cluster],
    until: Until,  # noqa: F811
) -> None:
    cluster = make_cluster(replicas=1)
    engine: Any = cluster.replica._engine
    with http_client(cluster.urls[0]) as http:
        hook = engine.maker._network.register_forward_pre_hook(raises())
        for _ in range(3):
            bad = start(http)
            until(lambda bad=bad: told(http, bad)["status"] == "failed", "failed")
        until(lambda: not cluster.replica._thread.healthy, "an exercise failed too")
        with pytest.raises(RuntimeError, match="three chunks in a row"):
            cluster.replica.check_health()
        answer = http.get("/health/ready")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        hook.remove()
        until(lambda: http.get("/health/ready").status_code == 200, "well again")


def test_s5_a_session_that_takes_its_replicas_down_is_given_to_no_fourth_one(
    service: Service, http: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """Each replica that makes its first chunk dies of it: the last ones stay for everybody else."""
    killed: list[str] = []

    async def dies(session_id: str, *_: Any) -> Any:
        killed.append(session_id)
        raise RayActorError

    monkeypatch.setattr(service.replica, "pull", dies)
    video = start(http)
    until(lambda: told(http, video)["status"] == "failed", "failed")
    assert killed == [video] * 3 and told(http, video)["error"]["code"] == "generation_failed"
    until(lambda: not engine.sessions, "its place is free")


@pytest.mark.slow
def test_s6_a_session_for_which_there_is_no_memory_ends_alone(
    make_cluster: Callable[..., Cluster],
    until: Until,  # noqa: F811
) -> None:
    cluster = make_cluster(replicas=1)
    engine: Any = cluster.replica._engine
    with http_client(cluster.urls[0]) as http, viewer(cluster.urls[0]) as neighbour:
        neighbour.start(prompt="a red circle", num_frames=105, seed=3)
        neighbour.read(1)
        caches = {id(session.cache) for session in engine.table.sessions.values()}
        take = engine.maker.pool.take

        def refuses_newcomers() -> int:
            if any(id(s.cache) not in caches and not s.cache.pages for s in engine.table.sessions.values()):
                raise PoolExhaustedError(SECRET)
            return int(take())

        engine.maker.pool.take = refuses_newcomers
        bad = start(http)
        until(lambda: told(http, bad)["status"] == "failed", "failed")
        engine.maker.pool.take = take
        assert SECRET not in str(told(http, bad))
        good = start(http)
        until(lambda: told(http, good)["status"] == "completed", "completed")
        assert neighbour.until("session.done")["chunks"] == 9
        until(lambda: engine.stats().cache_bytes == 0, "every page is back")


def test_s13_a_file_waits_for_its_storage_whole_or_not_at_all(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, until: Until
) -> None:
    """The durable storage is away when the file is finished, and when it is asked for after the local copy is gone."""
    durable = tmp_path / "durable"
    service = make_service(store={"sweep_s": 0.2}, files=str(durable))
    with http_client(service.urls[0]) as http:
        with monkeypatch.context() as away:
            away.setattr("diagonal.storage.Folder.put", raises(StorageError))
            video = start(http)
            until(lambda: told(http, video)["frames_done"] == 21, "all chunks")
            answer = http.get(f"/v1/videos/{video}/content")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_not_ready")
            assert not list(durable.rglob("*.mp4"))
        until(lambda: told(http, video)["status"] == "completed", "completed")
        whole = http.get(f"/v1/videos/{video}/content").content
        assert len(shades(whole)) == 21
        (Path(service.settings.data) / "videos" / video / "video.mp4").unlink()
        with monkeypatch.context() as away:
            away.setattr("diagonal.storage.Folder.has", raises(StorageError))
            answer = http.get(f"/v1/videos/{video}/content")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert SECRET not in answer.text and told(http, video)["status"] == "completed"
        assert http.get(f"/v1/videos/{video}/content").content == whole


def test_s13_a_file_that_breaks_off_while_it_is_given_is_not_taken_for_the_whole(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr("serve.gateway.gateway._PART_BYTES", 2000)
    service = make_service()
    with http_client(service.urls[0]) as http:
        video = start(http, num_frames=81)
        until(lambda: told(http, video)["status"] == "completed", "completed")
        content = service.store.content

        async def goes_away(video_id: str, begin: int, end: int) -> Any:
            if begin > 2000:
                raise OSError(SECRET)
            return await content(video_id, begin, end)

        monkeypatch.setattr(service.store, "content", goes_away)
        with pytest.raises(httpx2.RemoteProtocolError):
            http.get(f"/v1/videos/{video}/content")


def test_disk_full_fails_what_needs_it_and_is_over_when_there_is_room_again(
    service: Service, http: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    engine.allow(1)
    running = start(http, num_frames=81)
    until(lambda: told(http, running)["chunks_done"] == 1, "one chunk")
    with monkeypatch.context() as full:
        full.setattr(service.store._files, "put", raises(OSError))
        engine.allow(1000)
        assert http.post("/v1/videos", json={"prompt": "x"}).status_code == 503
        until(lambda: told(http, running)["status"] == "failed", "failed")
        until(lambda: not engine.sessions, "every place is free")
    assert {video["status"] for video in http.get("/v1/videos").json()["data"]} == {"failed"}, "nothing half begun"
    again = start(http)
    until(lambda: told(http, again)["status"] == "completed", "completed")


class Failing:
    """A metric of a back end that is down."""

    def __init__(self, *_: Any) -> None:
        self.calls = 0

    def inc(self, *_: Any) -> None:
        raise ConnectionError(SECRET)

    set = observe = inc


class Unmade:
    def __init__(self, *_: Any) -> None:
        raise RuntimeError(SECRET)


@pytest.mark.parametrize("kind", [Failing, Unmade])
def test_s14_metrics_that_nobody_takes_cost_no_frame(
    make_service: Callable[..., Service], kind: Any, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = FactoryBackend(kind, kind, kind)
    service = make_service(metrics=metrics)
    with http_client(service.urls[0]) as http:
        video = start(http, num_frames=81)
        assert len(shades(http.get(f"/v1/videos/{video}/stream").content)) == 81
        with viewer(service.urls[0]) as one:
            one.start(num_frames=81, extra_params={"pacing": "none"})
            one.until("session.done")
        assert http.get("/v1/nothing").status_code == 404
        until(lambda: told(http, video)["status"] == "completed", "completed")
    assert metrics.lost > 50 and SECRET not in caplog.text


class FullDisk(io.StringIO):
    def write(self, *_: Any) -> int:
        raise OSError("no space left on device")


@pytest.fixture
def broken_log() -> Iterator[None]:
    """A log that cannot be written; Python's logging reports that on stderr and goes on."""
    logger, handler = logging.getLogger("ray.serve"), logging.StreamHandler(FullDisk())
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_s14_a_log_that_cannot_be_written_costs_no_frame(broken_log: None, http: httpx2.Client) -> None:
    assert len(shades(http.get(f"/v1/videos/{start(http, num_frames=81)}/stream").content)) == 81
    assert http.get("/v1/nothing").status_code == 404
