"""A real Ray Serve under streams that people watch: its parts end, hang, drain or are replaced; crowds come (S4)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diagonal.client.client import API_KEY_VARIABLE
from jobs.benchmarks.load import overload
from jobs.benchmarks.load_sessions import Plan
from tests.faults.serving import CONTROLLER, PROXY, LiveService
from tests.faults.watchers import FPS, OverHttp, OverSocket, Watcher, assert_whole
from tests.serve.browser import Browser
from tests.serve.harness import http_client
from tests.serve.sockets import LOCAL_KEY, LOCAL_TOKEN

CHUNK_S = 0.75
BUSY_S = 20.0  # what a busy machine adds; a stream that waits for a deadline waits longer
DRAINED = 1012
LAST_S = 15.0  # of ten times the load; a minute by `python -m jobs.benchmarks.load --overload`


@pytest.fixture(scope="module")
def started(ray_cluster: str) -> Iterator[LiveService]:
    """One gateway in front of one replica of the embedded release; the overload, which comes first, is of these."""
    data = tempfile.mkdtemp(prefix="ds-")
    live = LiveService(data)
    try:
        live.start(replicas=1, gateways=1)
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


@pytest.mark.ci
def test_an_overload_is_refused_at_once_and_those_who_are_in_play_on(
    started: LiveService, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a busy machine keeps too; the figures of a calm one stand in docs/results/serving.md."""
    monkeypatch.setenv(API_KEY_VARIABLE, LOCAL_TOKEN)
    overloaded = asyncio.run(overload(Plan(started.url, seconds=5.0), LAST_S, seed=1, carrier="both"))
    figures = overloaded["figures"]
    slowest_fps, first_s, refused_s = (
        figures["session_fps"]["least"],
        figures["first_frame_s"]["p95"],
        figures["rejection_s"]["p95"],
    )
    record_property("slowest session, frames/s", round(slowest_fps, 1))
    record_property("first frame p95, s", round(first_s, 2))
    record_property("refusal p95, s", round(refused_s, 3))
    record_property("recovered after, s", overloaded["recovered_s"])
    assert figures["failed"] == {}, "whoever was admitted got all of his stream"
    assert sum(figures["rejected"].values()) > 4 * figures["completed"]
    assert set(figures["rejected"]) == {"server_full"} and figures["rejections_without_retry_after"] == 0
    assert refused_s < max(0.1, first_s), "who is refused hears it before others see anything"
    assert slowest_fps > FPS / 2 and overloaded["recovered_s"] is not None


@pytest.mark.ci
def test_a_replica_that_is_killed_ends_no_stream_and_disturbs_no_other(live: LiveService, ffprobe: str) -> None:
    watchers = watching(live, 9, (OverHttp, OverSocket, OverHttp, OverSocket))
    holders = [live.holder(one.id) for one in watchers]
    assert len(set(holders)) == 2
    live.kill(live.parts("Replica")[holders[0]])
    assert_undisturbed(watchers, ffprobe)
    for watcher, holder in zip(watchers, holders, strict=True):
        assert watcher.longest_gap_s() < CHUNK_S + 2.0 + BUSY_S
        assert (live.holder(watcher.id) == holder) == (holder != holders[0]), "the others stayed where they were"


def test_without_a_replica_a_stream_is_cut_and_does_not_seem_to_end(live: LiveService) -> None:
    live.deploy(replicas=1)
    (watcher,) = watching(live, 90, (OverHttp,))
    live.deploy(replicas=1, cpus=1000.0, wait=False)
    began_s = time.monotonic()
    with pytest.raises(httpx2.RemoteProtocolError):
        watcher.finish()
    assert 8 < time.monotonic() - began_s < 80
    assert live.record(watcher.id).error_code == "session_lost"


@pytest.mark.ci
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


@pytest.mark.ci
def test_gateways_are_stopped_under_their_viewers(live: LiveService, ffprobe: str) -> None:
    watchers = watching(live, 12, (OverHttp, OverSocket, OverHttp, OverSocket))
    live.deploy(gateways=1, wait=False)
    assert_undisturbed(watchers, ffprobe)
    live.settle()
    assert len(live.parts("Gateway")) == 1


def test_the_whole_service_is_replaced_under_its_viewers(live: LiveService, ffprobe: str) -> None:
    before = {pid for part in ("Store", "Gateway", "Replica") for pid in live.parts(part).values()}
    watchers = watching(live, 40)
    live.deploy(wait=False, retention_s=3600.0)
    assert_undisturbed(watchers, ffprobe)
    live.settle()
    assert not before & {pid for part in ("Store", "Gateway", "Replica") for pid in live.parts(part).values()}


@pytest.mark.ci
def test_the_session_of_a_process_that_hangs_goes_on_within_its_viewers_patience(
    live: LiveService, ffprobe: str
) -> None:
    watchers = watching(live, 12)
    hung = live.parts("Replica")[live.holder(watchers[0].id)]
    os.kill(hung, signal.SIGSTOP)
    try:
        assert_undisturbed(watchers, ffprobe)
        assert max(watcher.longest_gap_s() for watcher in watchers) < 10 + BUSY_S
    finally:
        live.kill(hung)


def test_streams_do_not_notice_that_serves_controller_died(live: LiveService, ffprobe: str) -> None:
    watchers = watching(live, 8)
    live.kill(live.process(CONTROLLER))
    assert_undisturbed(watchers, ffprobe)
    assert max(watcher.longest_gap_s() for watcher in watchers) < CHUNK_S + BUSY_S


@pytest.mark.parametrize("part", [pytest.param("gateway", marks=pytest.mark.ci), "proxy"])
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
    with http_client(live.url, LOCAL_KEY) as http:
        body = {"prompt": "a red circle moving right slowly", "num_frames": 2400}
        video = http.post("/v1/videos", json=body).raise_for_status().json()["id"]
    for process_id in live.parts("Gateway").values():
        live.kill(process_id)
    assert not live.record(video).status.over
    live.until("it is made to its end", lambda: live.record(video).status == "completed")


@pytest.fixture
def page(chromium: str, live: LiveService, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(chromium, tmp_path / "profile")
    browser.start(live.url)
    yield browser
    browser.stop()


def played_s(page: Browser) -> float:
    return float(page.run("document.getElementById('video').currentTime"))


def plays_on(page: Browser, live: LiveService, seconds: float) -> None:
    from_s = played_s(page)
    live.until("it plays on", lambda: played_s(page) > from_s + seconds)


def stalled_s(page: Browser) -> float:
    _, _, text = page.text("stalls").partition("·")
    return float(text.removesuffix(" s")) if text else 0.0


def test_an_endless_stream_on_the_page_outlives_its_replica_and_its_gateway(page: Browser, live: LiveService) -> None:
    live.until("the page knows the model", lambda: " fps" in page.text("model"))
    page.run("document.getElementById('endless').click()")
    page.run("document.getElementById('prompt').focus()")
    page.type("a red circle moving right slowly")
    page.press("Enter")
    live.until("it plays", lambda: page.text("state") == "playing")
    plays_on(page, live, 2.0)
    with http_client(live.url, LOCAL_KEY) as http:
        video = http.get("/v1/videos").json()["data"][0]["id"]
        before_s = stalled_s(page)
        live.kill(live.parts("Replica")[live.holder(video)])
        plays_on(page, live, 5.0)
        assert stalled_s(page) - before_s < 2.0 + BUSY_S
        for process_id in live.parts("Gateway").values():  # one of them has its socket
            live.kill(process_id)
        plays_on(page, live, 8.0)
        assert page.text("error") == "" and http.get(f"/v1/videos/{video}").json()["endless"]
    page.press("Escape")
    live.until("the place is free", lambda: live.record(video).status.over)


def test_ranges_conditions_and_heads_pass_through_serves_proxy(live: LiveService) -> None:
    with http_client(live.url, LOCAL_KEY) as http:
        made: dict[str, Any] = http.post("/v1/videos", json={"prompt": "a red circle", "num_frames": 21}).json()
        path = f"/v1/videos/{made['id']}/content"
        live.until("the file", lambda: http.get(path).status_code == 200)
        whole = http.get(path)
        part = http.get(path, headers={"Range": "bytes=5-99", "If-Range": whole.headers["etag"]})
        assert (part.status_code, part.content) == (206, whole.content[5:100])
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
        assert http.get(path, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
        assert http.get(path, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416
        later = http.get(f"/v1/videos/{made['id']}/stream", params={"start_chunk": 1}).content
        assert later.count(b"moof") == 1 and later.count(b"moov") == 1
