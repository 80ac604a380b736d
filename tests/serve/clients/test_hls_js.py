"""hls.js, as npm gives it, in Chromium on a page of another origin: a live stream by a link, and by its owner's key."""

from __future__ import annotations

import functools
import http.server
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest

from tests.conftest import need_program
from tests.serve.api.test_viewer import played_s, plays_on
from tests.serve.browser import Browser, Open
from tests.serve.harness import Service, Until, http_client, start, status
from tests.serve.sockets import LOCAL_TOKEN

pytestmark = [pytest.mark.clients, pytest.mark.timeout(240)]
PACKAGE = "hls.js@1.7.4"
PAGE = """<!doctype html><video id="video" muted playsinline></video><script src="hls.min.js"></script><script>
  window.errors = [];
  const asked = new URLSearchParams(location.hash.slice(1));
  const key = asked.get("key");
  const hls = new Hls({
    lowLatencyMode: true,
    xhrSetup: (request) => { if (key) request.setRequestHeader("Authorization", `Bearer ${key}`); },
  });
  hls.on(Hls.Events.ERROR, (_, { details, fatal }) => window.errors.push([details, fatal]));
  hls.on(Hls.Events.MANIFEST_PARSED, () => document.getElementById("video").play());
  hls.loadSource(asked.get("address"));
  hls.attachMedia(document.getElementById("video"));
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page of its own origin that plays by hls.js what its fragment names."""
    folder = tmp_path_factory.mktemp("hls-js")
    command = [need_program("npm"), "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/dist/hls.min.js")
        assert member is not None
        (folder / "hls.min.js").write_bytes(member.read())
    (folder / "page.html").write_text(PAGE)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def service(make_service: Callable[..., Service], pages: str) -> Service:
    return make_service(origins=pages, reader_start_timeout_s=20.0)


@pytest.fixture
def http_(service: Service) -> Iterator[httpx2.Client]:
    with http_client(service.urls[0]) as client:
        yield client


def plays(open_page: Open, pages: str, until: Until, **asked: str) -> Browser:
    """A page that shows something of what it was asked for."""
    page = open_page(f"{pages}/page.html#{urlencode(asked)}")
    until(lambda: page.run("window.errors !== undefined"), "the page is there")
    until(lambda: played_s(page) > 0, "it plays", seconds=90)
    return page


def endless(http_: httpx2.Client) -> str:
    body = {"prompt": "a red circle", "extra": {"endless": True}}
    return str(http_.post("/v1/videos", json=body).raise_for_status().json()["id"])


def asked_for(page: Browser) -> list[str]:
    names: list[str] = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    return names


def shared(service: Service, http_: httpx2.Client, video: str) -> str:
    made = http_.post(f"/v1/videos/{video}/viewers").raise_for_status().json()
    return f"{service.urls[0]}/{made['playlist_path']}"


def test_a_link_plays_live_a_few_chunks_behind(
    open_page: Open, pages: str, service: Service, http_: httpx2.Client, until: Until
) -> None:
    video = endless(http_)
    page = plays(open_page, pages, until, address=shared(service, http_, video))
    plays_on(page, until, 8.0)
    assert [error for error in page.run("window.errors") if error[1]] == []
    assert any("_HLS_msn=" in name for name in asked_for(page)), "it waits for the next chunk at the service"
    assert page.run("hls.latency") < 6.0
    made_s = status(http_, video)["frames_done"] / 16
    assert made_s - played_s(page) < 8.0


def test_an_owners_key_plays_without_a_link(
    open_page: Open, pages: str, service: Service, http_: httpx2.Client, until: Until
) -> None:
    address = f"{service.urls[0]}/v1/videos/{endless(http_)}/index.m3u8"
    page = plays(open_page, pages, until, address=address, key=LOCAL_TOKEN)
    plays_on(page, until, 2.0)
    assert [error for error in page.run("window.errors") if error[1]] == []


def test_a_finished_video_plays_to_its_end(
    open_page: Open, pages: str, service: Service, http_: httpx2.Client, until: Until
) -> None:
    video = start(http_, frames=33)
    until(lambda: status(http_, video)["status"] == "completed", "completed")
    page = plays(open_page, pages, until, address=shared(service, http_, video))
    until(lambda: page.run("document.getElementById('video').ended"), "it ends", seconds=90)
    assert played_s(page) == pytest.approx(33 / 16, abs=0.1)
    assert page.run("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames") == 33


def test_a_revoked_link_stops(
    open_page: Open, pages: str, service: Service, http_: httpx2.Client, until: Until
) -> None:
    video = endless(http_)
    page = plays(open_page, pages, until, address=shared(service, http_, video))
    plays_on(page, until, 2.0)
    assert [error for error in page.run("window.errors") if error[1]] == []
    viewer = http_.get(f"/v1/videos/{video}/viewers").json()["data"][0]["id"]
    http_.delete(f"/v1/videos/{video}/viewers/{viewer}").raise_for_status()
    until(lambda: any(fatal for _, fatal in page.run("window.errors")), "hls.js gives up", seconds=60)
    (gave_up, *_) = [details for details, fatal in page.run("window.errors") if fatal]
    assert gave_up in ("levelLoadError", "fragLoadError"), "for what the link no longer gives"
    assert status(http_, video)["status"] == "in_progress", "the video itself goes on"
