"""Fault S8: the machine's clock jumps by an hour, either way, and nobody notices but the clock on the wall."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from serve.records import WINDOW_S
from serve.tokens import CLIENT_SECRET, parse_secret
from tests.serve.harness import FakeEngine, Service, Until, http_client
from tests.serve.hostile import new_key, start, told
from tests.serve.sockets import cut, viewer

HOUR_S = 3600.0


class WallClock:
    """`time.time` of this process, which a test sets forward or back."""

    def __init__(self) -> None:
        self.offset_s, self._real = 0.0, time.time

    def __call__(self) -> float:
        return self._real() + self.offset_s


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    clock = WallClock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture(params=[HOUR_S, -HOUR_S], ids=["forward", "back"])
def jump(request: pytest.FixtureRequest, wall: WallClock) -> Callable[[], None]:
    def leap() -> None:
        wall.offset_s += request.param

    return leap


@pytest.fixture
def guarded(make_service: Callable[..., Service], wall: WallClock) -> Service:
    return make_service(store={"sweep_s": 0.1}, auth="keys", retention_s=1800.0)


@pytest.fixture
def http(guarded: Service) -> Iterator[httpx2.Client]:
    with http_client(guarded.urls[0]) as client:
        yield client


@pytest.mark.slow
def test_s8_a_stream_keeps_its_pace_over_a_jump(
    guarded: Service, http: httpx2.Client, engine: FakeEngine, jump: Callable[[], None]
) -> None:
    with viewer(guarded.urls[0], new_key(guarded)) as one:
        one.start(num_frames=72, extra_params={"pacing": "realtime"})
        one.read(2)
        jump()
        came = [time.monotonic()]
        for _ in range(3):
            one.read(1)
            came.append(time.monotonic())
        waits = [later - before for before, later in zip(came, came[1:], strict=False)]
        assert max(waits) < 10, "no stall"
        assert len(engine.made) < 6 or sum(waits) > 1.0, "no rush"
        jump()
        one.until("session.done")
    intervals = guarded.metrics.values("diagonal_chunk_interval_seconds")
    assert max(intervals) < 60 and sum(guarded.metrics.values("diagonal_stream_stall_seconds_total")) < 60


@pytest.mark.slow
def test_s8_videos_secrets_and_tokens_live_as_long_as_they_were_promised(
    guarded: Service, http: httpx2.Client, engine: FakeEngine, jump: Callable[[], None], until: Until
) -> None:
    headers = new_key(guarded)
    video = start(http, headers)
    until(lambda: told(http, video, headers)["status"] == "completed", "completed")
    secret = http.post("/v1/realtime/client_secrets", headers=headers).json()["value"]
    with viewer(guarded.urls[0], headers) as one:
        one.start(num_frames=900)
        one.read(1)
        cut(one)
    jump()
    time.sleep(0.5)  # several rounds of the upkeep
    assert told(http, video, headers)["status"] == "completed", "not expired"
    assert http.get(f"/v1/videos/{video}/content", headers=headers).status_code == 200
    with viewer(guarded.urls[0], {"Authorization": f"Bearer {secret}"}) as two:
        two.start(resume_token=one.resume_token)
        two.read(1)


@pytest.mark.slow
def test_s8_a_secret_ends_after_its_seconds_whatever_the_clock_says(
    guarded: Service, http: httpx2.Client, jump: Callable[[], None]
) -> None:
    headers = new_key(guarded)
    body = {"expires_after": {"seconds": 1}}
    value = http.post("/v1/realtime/client_secrets", headers=headers, json=body).json()["value"]
    jump()
    time.sleep(1.2)
    shown = parse_secret(CLIENT_SECRET, value)
    assert shown is not None and guarded.run(guarded.store.redeem(shown)) is None


def test_s8_and_17_a_quota_neither_opens_nor_shuts_with_a_jump(
    guarded: Service, http: httpx2.Client, engine: FakeEngine, jump: Callable[[], None], until: Until
) -> None:
    """What a full server refuses gives back what it took and no more, though the gateway's clock is another now."""
    engine.allow(0)
    headers, filler = new_key(guarded, frames_per_minute=50), new_key(guarded)
    jump()
    held = [start(http, filler) for _ in range(2)]
    body = {"prompt": "x", "num_frames": 21}
    for _ in range(4):
        assert http.post("/v1/videos", json=body, headers=headers).json()["error"]["code"] == "server_full"
    for video in held:
        http.delete(f"/v1/videos/{video}", headers=filler)
    until(lambda: not engine.sessions, "room again")
    codes = []
    for _ in range(3):
        answer = http.post("/v1/videos", json=body, headers=headers)
        codes.append(answer.status_code)
        if answer.status_code == 200:
            http.delete(f"/v1/videos/{answer.json()['id']}", headers=headers)
            until(lambda: not engine.sessions, "room again")
    assert codes == [200, 200, 429]
    wait_s = int(http.post("/v1/videos", json=body, headers=headers).headers["retry-after"])
    assert 1 <= wait_s <= WINDOW_S


def test_s8_the_time_to_the_first_frame_is_measured_by_no_clock_that_jumps(
    guarded: Service, http: httpx2.Client, engine: FakeEngine, jump: Callable[[], None]
) -> None:
    engine.allow(0)
    headers = new_key(guarded)
    video = start(http, headers)
    jump()
    engine.allow(100)
    http.get(f"/v1/videos/{video}/stream", headers=headers)
    (waited_s,) = guarded.metrics.values("diagonal_time_to_first_frame_seconds")
    assert 0 <= waited_s < 60
