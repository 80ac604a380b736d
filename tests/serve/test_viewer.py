"""The page in a real browser: it plays while the video is made, and a prompt change reaches the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.browser import Browser
from tests.serve.conftest import FakeEngine, Service, shade

Until = Callable[..., Any]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
FIRST, SECOND = "a red circle", "a blue square"
PIXEL = """(() => {
  const video = document.getElementById("video");
  if (video.readyState < 2) return -1;
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data[0];
})()"""


@pytest.fixture
def page(chromium: str, service: Service, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(chromium, tmp_path / "profile")
    browser.start(service.urls[0])
    yield browser
    browser.stop()


def started(page: Browser, until: Until, prompt: str = FIRST) -> None:
    until(lambda: "fake-tiny" in page.text("model"), "the page knows the model", seconds=30)
    page.run("document.getElementById('prompt').focus()")
    page.type(prompt)
    page.press("Enter")


def shows(page: Browser, prompt: str) -> bool:
    return abs(int(page.run(PIXEL)) - shade(prompt)) <= 6


def test_it_plays_while_the_video_is_made_and_a_prompt_change_reaches_the_screen(
    page: Browser, until: Until, http: httpx.Client
) -> None:
    started(page, until)
    until(lambda: page.text("state") == "playing" and shows(page, FIRST), "the first prompt is on screen", seconds=60)
    assert page.text("first-frame").endswith(" ms")
    assert http.get("/v1/videos").json()["data"][0]["status"] == "in_progress"
    page.type(SECOND)
    page.press("Enter")
    until(lambda: shows(page, SECOND), "the second prompt is on screen", seconds=60)
    until(lambda: page.text("delay").endswith(" s"), "the delay is told", seconds=30)
    rows = page.run("[...document.querySelectorAll('#timeline li')].map(row => [row.dataset.state, row.innerText])")
    assert [state for state, _ in rows] == ["on screen", "on screen"] and SECOND in rows[0][1]
    assert page.text("fps").endswith(" fps")
    assert page.console == []


def test_escape_stops_it_and_frees_the_place(page: Browser, until: Until, engine: FakeEngine) -> None:
    started(page, until)
    until(lambda: page.text("state") == "playing", "playing", seconds=60)
    page.press("Escape")
    until(lambda: not engine.sessions, "the place is free", seconds=30)
    assert page.text("state") == "stopped" and page.text("start") == "Start"


def test_closing_the_page_frees_the_place(page: Browser, until: Until, engine: FakeEngine) -> None:
    started(page, until)
    until(lambda: page.text("state") == "playing", "playing", seconds=60)
    page.call("Page.navigate", url="about:blank")
    until(lambda: not engine.sessions, "the place is free", seconds=30)


def test_a_short_video_plays_to_its_end_and_can_be_downloaded(page: Browser, until: Until) -> None:
    until(lambda: "fake-tiny" in page.text("model"), "the page knows the model", seconds=30)
    page.run("document.getElementById('seconds').value = 2")
    started(page, until)
    until(lambda: page.text("state") == "finished", "finished", seconds=60)
    script = "fetch(document.getElementById('download').href).then(answer => answer.status)"
    until(lambda: page.run(script) == 200, "the file is there", seconds=30)
    assert page.run("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames") >= 24


def test_a_full_server_is_told_on_the_page(page: Browser, until: Until, http: httpx.Client, engine: FakeEngine) -> None:
    engine.allow(0)
    for _ in range(2):
        http.post("/v1/videos", json={"prompt": FIRST})
    started(page, until)
    until(lambda: "every session slot is in use" in page.text("error"), "the error is shown", seconds=30)
    assert "again in 3 s" in page.text("error") and page.text("start") == "Start"


def test_a_video_that_fails_is_told_on_the_page(page: Browser, until: Until, engine: FakeEngine) -> None:
    engine.fail_at = 3
    started(page, until)
    until(lambda: page.text("state") == "failed", "the failure is shown", seconds=60)
    assert page.text("error") == "the stream broke off"
