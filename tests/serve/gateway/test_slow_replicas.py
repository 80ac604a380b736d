"""Late is not lost: a replica that is slow, or does not answer, fails no video, holds no create and keeps no quota."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from ray.exceptions import RayActorError

from tests.serve.harness import Cluster, FakeEngine, Service, Until, start
from tests.serve.hostile import new_key, told


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


async def fails(*_: Any) -> Any:
    raise RayActorError


@pytest.mark.slow
@pytest.mark.parametrize("hung", ["open", "close"])
def test_a_replica_that_hangs_holds_no_create_and_keeps_no_quota(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, hung: str
) -> None:
    """It never opens the session, or, when the store failed to keep it, never gives it back."""
    for name in ("_OPEN_TIMEOUT_S", "_SILENCE_S"):
        monkeypatch.setattr(f"serve.gateway.replica_session.{name}", 0.5)
    service = make_service(auth="keys")
    headers = new_key(service, sessions=1, frames_per_minute=81)
    body = {"prompt": "a red circle", "num_frames": 81}
    with httpx2.Client(base_url=service.urls[0], timeout=20, headers=headers) as http:
        with monkeypatch.context() as broken:
            broken.setattr(service.replica, hung, never)
            if hung == "close":
                broken.setattr(service.store, "opened", fails)
            began_s = time.monotonic()
            answer = http.post("/v1/videos", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert time.monotonic() - began_s < 5
        assert http.get("/v1/videos").json()["data"] == []
        assert http.post("/v1/videos", json=body).status_code == 200, "neither its place nor its frames are charged"


def slow(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    step = engine.step

    def late() -> Any:
        results = step()
        time.sleep(step_s if results else 0.0)
        return results

    monkeypatch.setattr(engine, "step", late)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [5, 10])
def test_steps_of_many_times_their_bound_fail_no_video_and_are_named_as_late(
    service: Service,
    http: httpx2.Client,
    engine: FakeEngine,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bound: int,
) -> None:
    thread = service.replica._thread
    monkeypatch.setattr(type(thread), "deadline_s", 0.1)
    monkeypatch.setattr("serve.replica.engine_thread.TICK_S", 0.1)
    monkeypatch.setattr("serve.replica.replica._REAP_EVERY_S", 0.1)
    monkeypatch.setattr("serve.gateway.replica_session._SLICE_S", 0.2)
    engine.allow(0)
    videos = [start(http, 45, pacing) for pacing in ("none", "realtime")]
    reader = threading.Thread(target=lambda: http.get(f"/v1/videos/{videos[1]}/stream"))
    reader.start()
    slow(engine, monkeypatch, 0.1 * bound)
    engine.allow(100)
    until(lambda: thread.late, "a step is late")
    refused = httpx2.post(f"{service.urls[1]}/v1/videos", json={"prompt": "x", "num_frames": 9})
    assert refused.status_code == 200 or refused.json()["error"]["code"] in ("replica_late", "server_full")
    for video in videos:
        until(lambda video=video: told(http, video)["status"] == "completed", "completed", seconds=40)
    reader.join(20)
    moves = service.metrics.labels("diagonal_session_migrations_total")
    assert moves and {(one["cause"], one["outcome"]) for one in moves} == {("replica_late", "stayed")}
    assert sum(service.metrics.values("diagonal_engine_late_seconds_total")) > 0
    assert "step is late" in caplog.text


@pytest.mark.slow
def test_a_late_replica_is_left_for_one_that_has_room(make_cluster: Callable[..., Cluster], until: Until) -> None:
    cluster = make_cluster()
    with httpx2.Client(base_url=cluster.urls[0], timeout=60) as http:
        video = start(http, 957)
        old = cluster.holder(video)
        engine: Any = cluster.replicas[old]._engine
        step, go = engine.step, threading.Event()
        engine.step = lambda: (go.wait(60), step())[1]
        try:
            until(lambda: cluster.holder(video) not in ("", old), "moved", seconds=30)
            until(lambda: told(http, video)["status"] == "completed", "completed", seconds=60)
            assert told(http, video)["frames_done"] == 957, (
                "the late replica never finished a step: another made the rest"
            )
        finally:
            go.set()


@pytest.mark.slow
def test_a_replica_whose_engine_hangs_is_lost(
    service: Service, http: httpx2.Client, engine: FakeEngine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own deadline shows it: Serve is told to replace it, and its session counts a loss."""
    monkeypatch.setattr(type(service.replica._thread), "deadline_s", 0.05)
    monkeypatch.setattr("serve.replica.engine_thread.TICK_S", 0.1)
    monkeypatch.setattr("serve.replica.replica._REAP_EVERY_S", 0.1)
    monkeypatch.setattr("serve.gateway.driver.UNWATCHED_PATIENCE_S", 0.5)
    monkeypatch.setattr("serve.gateway.failover.FULL_PATIENCE_S", 0.5)
    hangs, step = threading.Event(), engine.step
    monkeypatch.setattr(engine, "step", lambda: (hangs.wait(60), step())[1])
    try:
        video = start(http, 45)
        until(lambda: service.replica._thread.lost, "lost")
        with pytest.raises(RuntimeError, match="hangs"):
            service.replica.check_health()
        until(lambda: told(http, video)["status"] == "failed", "no other replica")
        assert told(http, video)["error"]["code"] == "session_lost"
    finally:
        hangs.set()
