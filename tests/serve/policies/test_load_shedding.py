"""In an overload, whoever comes right after a refusal is refused without a question to store and replica."""

from __future__ import annotations

import time
from typing import Any

import httpx2
import pytest

from serve.policies.load_shedding import RecentRefusals
from serve.records import Pacing, Refused, VideoRecord
from tests.serve.harness import FakeEngine, Service, Until

REALTIME: dict[str, Any] = {"prompt": "a red circle", "num_frames": 81, "extra": {"pacing": "realtime"}}
FULL = Refused("server_full", "no room", retry_after_s=60.0)
SOON = Refused("server_full", "no room", retry_after_s=1.0)


class Asked:
    """What the memory looks at of a video."""

    def __init__(self, model: str = "tiny", pacing: Pacing = Pacing.REALTIME) -> None:
        self.model, self.pacing = model, pacing


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


@pytest.fixture
def refusals(clock: list[float]) -> RecentRefusals:
    return RecentRefusals(lambda: clock[0])


def asked(**changes: Any) -> VideoRecord:
    video: Any = Asked(**changes)
    return video


def refuse(refusals: RecentRefusals, times: int) -> None:
    for _ in range(times):
        assert refusals.cached_refusal(asked()) is None
        refusals.note(asked(), FULL)


def test_a_few_refusals_are_no_overload(refusals: RecentRefusals) -> None:
    refuse(refusals, 8)
    assert refusals.cached_refusal(asked()) is FULL
    assert (
        refusals.cached_refusal(asked(pacing=Pacing.NONE)) is None
        and refusals.cached_refusal(asked(model="other")) is None
    )


def test_a_replica_is_asked_as_often_as_who_was_refused_was_told_to_come_again(
    refusals: RecentRefusals, clock: list[float]
) -> None:
    refuse(refusals, 8)
    questions = 0
    for _ in range(800):
        clock[0] += 0.01
        if refusals.cached_refusal(asked()) is None:
            questions += 1
            refusals.note(asked(), SOON)
    assert 7 <= questions <= 9


def test_one_at_a_time_asks_anew(refusals: RecentRefusals, clock: list[float]) -> None:
    refuse(refusals, 8)

    def wait(seconds: float) -> None:
        clock[0] += 0.05
        for _ in range(round(seconds * 10)):  # they keep coming meanwhile
            clock[0] += 0.1
            told.append(refusals.cached_refusal(asked()))

    told: list[Refused | None] = []
    wait(2.0)
    assert told == [FULL] * 19 + [None], "after two seconds one asks"
    wait(0.4)
    assert told[20:] == [FULL] * 4, "the others are told what was true before"
    refusals.clear_probe(asked())
    assert refusals.cached_refusal(asked()) is None, "there was room: the next one asks at once"
    wait(0.6)
    assert told[24:] == [FULL] * 4 + [None, FULL], "an answer that does not come holds nobody up for long"


def test_after_a_refusal_a_replica_is_asked_for_room_before_anything_is_written(
    service: Service, http: httpx2.Client, engine: FakeEngine
) -> None:
    engine.allow(0)
    for _ in range(2):
        http.post("/v1/videos", json=REALTIME).raise_for_status()
    assert http.post("/v1/videos", json=REALTIME).status_code == 429
    admit, admitted = service.store.admit, list[str]()

    async def counted(video: VideoRecord, *others: Any) -> Any:
        admitted.append(video.id)
        return await admit(video, *others)

    service.store.admit = counted
    refused = http.post("/v1/videos", json=REALTIME)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3") and not admitted
    service.gateways[0]._refusals._now = lambda: time.monotonic() + 11.0
    assert http.post("/v1/videos", json=REALTIME).status_code == 429 and len(admitted) == 1


def test_an_overload_that_is_over_is_forgotten(refusals: RecentRefusals, clock: list[float]) -> None:
    refuse(refusals, 8)
    clock[0] += 2.1
    assert refusals.cached_refusal(asked()) is None
    clock[0] += 1.0
    refuse(refusals, 3)


def test_what_would_be_refused_at_any_time_is_not_remembered(refusals: RecentRefusals) -> None:
    for _ in range(20):
        refusals.note(asked(), Refused("invalid_value", "no"))
    assert refusals.cached_refusal(asked()) is None


def test_in_an_overload_store_and_replica_are_not_asked(
    service: Service, http: httpx2.Client, engine: FakeEngine, until: Until
) -> None:
    engine.allow(0)
    videos = [http.post("/v1/videos", json=REALTIME).raise_for_status().json()["id"] for _ in range(2)]
    for _ in range(8):
        assert http.post("/v1/videos", json=REALTIME).status_code == 429
    service.gateways[0]._refusals._now = lambda: 0.0  # as long as it stands still, all is fresh
    known = next(iter(service.gateways[0]._refusals._known.values()))
    known.asked_s = 0.0
    known.told_s.extend([0.0] * 8)
    admit, calls = service.store.admit, list[str]()

    async def counted(video: VideoRecord, *others: Any) -> Any:
        calls.append(video.id)
        return await admit(video, *others)

    service.store.admit = counted
    answers = [http.post("/v1/videos", json=REALTIME) for _ in range(5)]
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(429, "3")} and not calls
    http.post("/v1/videos", json=REALTIME, headers={"Idempotency-Key": "k1"})
    assert len(calls) == 1, "it could be a retry of one that was admitted"
    service.gateways[0]._refusals._now = lambda: 10.0
    http.delete(f"/v1/videos/{videos[0]}").raise_for_status()
    until(lambda: http.post("/v1/videos", json=REALTIME).status_code == 200, "the free place is given away")
