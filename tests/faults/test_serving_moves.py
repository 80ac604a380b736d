"""Parts of the service that end, hang, drain or are replaced on a real Ray Serve, under streams that people watch."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.faults.serving import CONTROLLER, PROXY, LiveService
from tests.faults.watchers import OverHttp, OverSocket, Watcher, assert_whole

CHUNK_S = 0.75
BUSY_S = 3.0  # what a machine of two cores adds on which all parts, their successors and the viewers run
DRAINED = 1012


@pytest.fixture(scope="module")
def started(ray_cluster: str) -> Iterator[LiveService]:
    data = tempfile.mkdtemp(prefix="ds-")
    live = LiveService(data)
    try:
        live.start()
        yield live
    finally:
        live.close()
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def live(started: LiveService) -> LiveService:
    """Two gateways and two replicas, whatever the test before did to them."""
    started.deploy()
    return started


def watching(live: LiveService, seconds: float, kinds: tuple[Any, ...] = (OverHttp, OverSocket)) -> list[Any]:
    """Viewers of each kind, who have begun to watch."""
    watchers: list[Watcher] = [kind(live.url, seconds, seed).start() for seed, kind in enumerate(kinds)]
    for watcher in watchers:
        watcher.reached(4)
    return watchers


def assert_undisturbed(watchers: list[Any], ffprobe: str) -> None:
    """All came to their ends with every frame, and no connection was closed without a word why."""
    for watcher in watchers:
        assert_whole(watcher.finish(), ffprobe)
        closes = getattr(watcher, "closes", [])
        assert set(closes) <= {DRAINED} and getattr(watcher, "drained", 0) == len(closes)
        assert getattr(watcher, "indices", []) == list(range(len(getattr(watcher, "indices", []))))


def test_a_replica_that_is_killed_ends_no_stream_and_disturbs_no_other(live: LiveService, ffprobe: str) -> None:
    watchers = watching(live, 9, (OverHttp, OverSocket, OverHttp, OverSocket))
    holders = [live.holder(one.id) for one in watchers]
    assert len(set(holders)) == 2
    live.kill(live.parts("Replica")[holders[0]])
    assert_undisturbed(watchers, ffprobe)
    for watcher, holder in zip(watchers, holders, strict=True):
        assert watcher.longest_gap_s() < CHUNK_S + 2.0 + BUSY_S
        assert (live.holder(watcher.id) == holder) == (holder != holders[0]), "the others stayed where they were"


def test_without_a_replica_for_ten_seconds_a_stream_is_cut_and_does_not_seem_to_end(live: LiveService) -> None:
    live.deploy(replicas=1)
    (watcher,) = watching(live, 30, (OverHttp,))
    live.deploy(replicas=1, cpus=1000.0, wait=False)
    began_s = time.monotonic()
    with pytest.raises(httpx.RemoteProtocolError):
        watcher.finish()
    assert 8 < time.monotonic() - began_s < 30
    assert live.record(watcher.id).error_code == "session_lost"


def test_scaling_down_loses_nothing(live: LiveService, ffprobe: str) -> None:
    watchers = watching(live, 12, (OverHttp, OverSocket, OverHttp, OverSocket))
    assert len({live.holder(one.id) for one in watchers}) == 2
    live.deploy(replicas=1, wait=False)
    assert_undisturbed(watchers, ffprobe)
    assert {live.holder(one.id) for one in watchers} == set(live.parts("Replica"))


def test_replicas_are_replaced_under_their_sessions(live: LiveService, ffprobe: str) -> None:
    before = set(live.parts("Replica"))
    watchers = watching(live, 30)
    live.deploy(new=True, wait=False)
    assert_undisturbed(watchers, ffprobe)
    live.settle()
    assert not before & set(live.parts("Replica"))


def test_gateways_are_stopped_under_their_viewers(live: LiveService, ffprobe: str) -> None:
    watchers = watching(live, 12, (OverHttp, OverSocket, OverHttp, OverSocket))
    live.deploy(gateways=1, wait=False)
    assert_undisturbed(watchers, ffprobe)
    live.settle()
    assert len(live.parts("Gateway")) == 1


def test_the_whole_service_is_replaced_under_its_viewers(live: LiveService, ffprobe: str) -> None:
    before = {pid for part in ("Store", "Gateway", "Replica") for pid in live.parts(part).values()}
    watchers = watching(live, 40)
    live.deploy(wait=False, expire_s=3600.0)
    assert_undisturbed(watchers, ffprobe)
    live.settle()
    assert not before & {pid for part in ("Store", "Gateway", "Replica") for pid in live.parts(part).values()}


def test_the_session_of_a_process_that_hangs_goes_on_within_its_viewers_patience(
    live: LiveService, ffprobe: str
) -> None:
    watchers = watching(live, 12)
    hung = live.parts("Replica")[live.holder(watchers[0].id)]
    os.kill(hung, signal.SIGSTOP)
    try:
        assert_undisturbed(watchers, ffprobe)
        assert max(watcher.longest_gap_s() for watcher in watchers) < 10
    finally:
        live.kill(hung)


def test_streams_do_not_notice_that_serves_controller_died(live: LiveService, ffprobe: str) -> None:
    watchers = watching(live, 8)
    live.kill(live.process(CONTROLLER))
    assert_undisturbed(watchers, ffprobe)
    assert max(watcher.longest_gap_s() for watcher in watchers) < CHUNK_S + BUSY_S


@pytest.mark.parametrize("part", ["gateway", "proxy"])
def test_a_viewer_goes_on_by_his_token_after_a_gateway_or_a_proxy_died(
    live: LiveService, ffprobe: str, part: str
) -> None:
    watchers = watching(live, 10, (OverSocket, OverSocket))
    for process_id in live.parts("Gateway").values() if part == "gateway" else [live.process(PROXY)]:
        live.kill(process_id)
    for watcher in watchers:
        assert_whole(watcher.finish(), ffprobe)
        assert watcher.closes and watcher.indices == list(range(len(watcher.indices)))


def test_a_video_that_nobody_watches_outlives_its_gateways(live: LiveService) -> None:
    with httpx.Client(base_url=live.url, timeout=60) as http:
        body = {"prompt": "a red circle moving right slowly", "num_frames": 2400}
        video = http.post("/v1/videos", json=body).raise_for_status().json()["id"]
    for process_id in live.parts("Gateway").values():
        live.kill(process_id)
    assert not live.record(video).status.over
    live.until("it is made to its end", lambda: live.record(video).status == "completed")
