"""The page of a viewer's link in a real browser: it plays, and steers where the link may; the page that makes links."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tests.serve.api.test_viewer import FIRST, PIXEL, SECOND, click, played_s, playing, plays_on, ready, started
from tests.serve.browser import Browser, Open
from tests.serve.harness import FakeEngine, Service, Until, shade, start, status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
STAGE_BOTTOM = "document.getElementById('stage').getBoundingClientRect().bottom"
FORM_TOP = "document.getElementById('form').getBoundingClientRect().top"
CHOOSE_STEER = """(() => {
  const role = document.getElementById("share-role");
  role.value = "steer";
  role.dispatchEvent(new Event("change"));
})()"""
NATIVE = "delete window.MediaSource; delete window.ManagedMediaSource; window.renamed = true"


def endless(http: httpx2.Client, prompt: str = FIRST) -> str:
    body = {"prompt": prompt, "extra": {"endless": True}}
    return str(http.post("/v1/videos", json=body).raise_for_status().json()["id"])


def link(http: httpx2.Client, video: str, **asked: Any) -> dict[str, Any]:
    return dict(http.post(f"/v1/videos/{video}/viewers", json=asked).raise_for_status().json())


def shows(page: Browser, prompt: str) -> bool:
    return abs(int(page.run(PIXEL)) - shade(prompt)) <= 6


def hidden(page: Browser, element_id: str) -> bool:
    return bool(page.run(f"document.getElementById('{element_id}').hidden"))


def watching(page: Browser, until: Until) -> None:
    until(lambda: page.text("state") == "live" and played_s(page) > 0, "it plays", seconds=90)


@pytest.fixture
def live(http: httpx2.Client, until: Until) -> str:
    """A stream that has gone on for a while, and goes on for as long as somebody watches."""
    video, seen = endless(http), 0
    while seen < 8:
        http.get(f"/v1/videos/{video}/index.m3u8", params={"_HLS_msn": seen}).raise_for_status()
        seen += 1
    return video


def test_a_watch_link_plays_a_live_stream_from_where_it_is_and_offers_nothing_else(
    open_page: Open, service: Service, http: httpx2.Client, live: str, until: Until
) -> None:
    page = open_page(f"{service.urls[1]}/{link(http, live)['watch_path']}")
    watching(page, until)
    assert played_s(page) > 2, "it does not begin with what is long over"
    plays_on(page, until, 2.0)
    assert hidden(page, "form") and shows(page, FIRST) and hidden(page, "play")
    click(page, "video")
    until(lambda: not hidden(page, "play"), "paused")
    click(page, "play")
    plays_on(page, until)
    page.run("document.getElementById('video').currentTime = 0")
    until(lambda: played_s(page) > 2, "where no media is, it goes on with what there is")
    assert page.console == []


def test_a_link_that_steers_changes_the_prompt_for_all_who_watch(
    open_page: Open, service: Service, http: httpx2.Client, live: str, until: Until
) -> None:
    page = open_page(f"{service.urls[0]}/{link(http, live, role='steer', name='Ann')['watch_path']}")
    watching(page, until)
    for width, height in ((390, 844), (1280, 800)):
        page.look(width, height, "dark")
        video_bottom, prompt_top = (page.run(edge) for edge in (STAGE_BOTTOM, FORM_TOP))
        assert video_bottom <= prompt_top, f"at {width} pixels the prompt stands below the video"
        assert page.run("document.documentElement.scrollWidth") <= width
    page.run("document.getElementById('prompt').focus()")
    page.type(SECOND)
    page.press("Enter")
    until(lambda: shows(page, SECOND), "the new prompt is on screen", seconds=90)
    assert "next chunk" in page.text("note")
    assert [change["made_by"] for change in status(http, live)["interactions"]] == ["Ann"]


def test_a_finished_video_plays_to_its_end_also_by_the_browsers_own_player(
    open_page: Open, service: Service, http: httpx2.Client, until: Until
) -> None:
    video = start(http, frames=33, prompt=FIRST)
    until(lambda: status(http, video)["status"] == "completed", "completed")
    address = f"{service.urls[0]}/{link(http, video, role='steer')['watch_path']}"
    page = open_page(address)
    until(lambda: page.text("state") == "finished", "finished", seconds=90)
    assert hidden(page, "form"), "there is nothing left to steer"
    assert played_s(page) == pytest.approx(33 / 16, abs=0.1)
    page.call("Page.enable")
    page.call("Page.addScriptToEvaluateOnNewDocument", source=NATIVE)
    page.call("Page.navigate", url=address)
    until(lambda: page.run("window.renamed === true"), "the page is loaded anew")
    until(lambda: page.text("state") == "finished", "finished", seconds=90)
    assert str(page.run("document.getElementById('video').src")).endswith("/index.m3u8")


def test_a_link_that_is_over_says_so(open_page: Open, service: Service, http: httpx2.Client, until: Until) -> None:
    page = open_page(f"{service.urls[0]}/watch/vt_0123456789abcdef_nothing")
    until(lambda: "over" in page.text("state"), "it says so")
    assert hidden(page, "form")


def test_the_page_shares_what_it_shows(
    open_page: Open, service: Service, http: httpx2.Client, until: Until, engine: FakeEngine
) -> None:
    page = open_page(service.urls[0])
    ready(page, until)
    assert page.run("document.getElementById('share').disabled"), "nothing to share yet"
    started(page, until)
    playing(page, until)
    click(page, "share")
    given = "document.getElementById('share-link').value"
    first = until(lambda: page.run(given), "the link is there")
    assert first.startswith(f"{service.urls[0]}/watch/vt_")
    assert page.run("document.querySelector('#share-qr svg path').getBoundingClientRect().width") > 100
    page.run(CHOOSE_STEER)
    second = until(lambda: page.run(given) not in ("", first) and page.run(given), "another link")
    page.press("Escape")
    until(lambda: not page.run("document.getElementById('share-dialog').open"), "the dialog is closed")
    assert page.text("state") == "playing" and engine.sessions, "Escape closed the dialog alone"
    other = open_page(second)
    watching(other, until)
    assert not hidden(other, "form")
    video = http.get("/v1/videos").json()["data"][0]["id"]
    assert [one["role"] for one in http.get(f"/v1/videos/{video}/viewers").json()["data"]] == ["watch", "steer"]
    assert page.console == other.console == []
