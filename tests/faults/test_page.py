"""The page and the files' routes on a real Ray Serve, behind its proxy, while its parts are ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.serving import LiveService
from tests.faults.test_serving_moves import BUSY_S, live, started
from tests.serve.browser import Browser

__all__ = ["live", "started"]


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
    with httpx.Client(base_url=live.url, timeout=60) as http:
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
    with httpx.Client(base_url=live.url, timeout=60) as http:
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
