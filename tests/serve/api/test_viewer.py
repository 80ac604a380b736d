"""The page in a real browser: it plays, is steered, survives what breaks, saves what was seen, and needs no mouse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from serve.settings import ServeSettings
from tests.serve.browser import Browser, Open
from tests.serve.harness import Cluster, FakeEngine, Keyed, Service, SideBySide, Until, http_client, shade
from tests.serve.sockets import LOCAL_TOKEN
from tests.serve.wire import wire

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
WATCH_STATE = """(() => {
  const state = document.getElementById("state");
  window.told = [];
  new MutationObserver(() => window.told.push(state.textContent)).observe(state, { childList: true, subtree: true });
})()"""


def test_a_link_with_the_local_key_opens_the_page_and_leaves_the_address(
    open_page: Open, settings: ServeSettings, engine: FakeEngine, until: Until
) -> None:
    local = Service(settings, engine)
    local.shows_key = False
    local.start()
    try:
        stranger = open_page(local.urls[0])
        until(
            lambda: stranger.run("document.getElementById('key-form')?.hidden === false"),
            "the page asks for a key",
            seconds=30,
        )
        assert "local_key" in stranger.text("key-hint")
        page = open_page(f"{local.urls[0]}/#key={LOCAL_TOKEN}")
        started(page, until)
        playing(page, until)
        assert page.run("location.href") == f"{local.urls[0]}/"
    finally:
        local.stop()


@pytest.fixture
def page(open_page: Open, service: Service) -> Browser:
    return open_page(service.urls[0])


def ready(page: Browser, until: Until) -> None:
    until(lambda: " fps" in page.text("model"), "the page knows the model")


def started(page: Browser, until: Until, prompt: str = FIRST) -> None:
    ready(page, until)
    page.run("document.getElementById('prompt').focus()")
    page.type(prompt)
    page.press("Enter")


def playing(page: Browser, until: Until) -> None:
    until(lambda: page.text("state") == "playing", "playing")


def played_s(page: Browser) -> float:
    return float(page.run("document.getElementById('video').currentTime"))


def plays_on(page: Browser, until: Until, seconds: float = 1.0) -> None:
    """So much more is shown from now on."""
    from_s = played_s(page)
    until(lambda: played_s(page) > from_s + seconds, "it plays on")


def shows(page: Browser, prompt: str) -> bool:
    return abs(int(page.run(PIXEL)) - shade(prompt)) <= 6


def click(page: Browser, element_id: str) -> None:
    page.run(f"document.getElementById('{element_id}').click()")


def saved(folder: Path, until: Until) -> Path:
    """The file that the browser saves, once it is whole."""
    return Path(until(lambda: next(iter(folder.glob("*.mp4")), None), "the file is saved"))


def frames_of(ffprobe: str, file: Path) -> int:
    """As ffprobe counts them; their times rise evenly."""
    asked = ["-v", "error", "-select_streams", "v", "-show_entries", "frame=pts_time", "-of", "json"]
    command = [ffprobe, *asked, str(file)]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    times = [float(frame["pts_time"]) for frame in told["frames"]]
    assert all(abs(b - a - 1 / 16) < 0.002 for a, b in zip(times, times[1:], strict=False))
    return len(times)


def test_it_plays_while_the_video_is_made_and_a_prompt_change_reaches_the_screen(
    page: Browser, until: Until, http: httpx2.Client
) -> None:
    started(page, until)
    until(lambda: page.text("state") == "playing" and shows(page, FIRST), "the first prompt is on screen")
    until(lambda: page.text("first-frame").endswith(" ms"), "the first frame's time is told")
    assert http.get("/v1/videos").json()["data"][0]["status"] == "in_progress"
    page.type(SECOND)
    page.press("Enter")
    until(lambda: shows(page, SECOND), "the second prompt is on screen")
    until(lambda: page.text("delay").endswith(" s"), "the delay is told")
    rows = page.run("[...document.querySelectorAll('#timeline li')].map(row => [row.dataset.state, row.innerText])")
    assert [state for state, _ in rows] == ["on screen", "on screen"] and SECOND in rows[0][1]
    assert page.text("fps").endswith(" fps") and page.text("ahead").endswith(" s")
    assert page.console == []


def test_a_pause_stops_picture_and_making_until_it_is_resumed(
    page: Browser, until: Until, engine: FakeEngine, http: httpx2.Client
) -> None:
    started(page, until)
    playing(page, until)
    click(page, "pause")
    until(lambda: page.text("state") == "paused", "paused")
    until(lambda: http.get("/v1/videos").json()["data"][0]["paused"], "the service knows")
    at_s, made = played_s(page), len(engine.made)
    page.run("new Promise(done => setTimeout(done, 1500))")
    assert played_s(page) == at_s and len(engine.made) <= made + 1 and page.text("pause") == "Resume"
    click(page, "pause")
    plays_on(page, until, 2.0)
    assert page.text("stalls") in ("0", "–") or float(page.text("stalls").split()[0]) <= 1  # a pause is no stall


def test_escape_stops_it_and_frees_the_place(page: Browser, until: Until, engine: FakeEngine) -> None:
    started(page, until)
    playing(page, until)
    page.press("Escape")
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    assert page.text("state") == "stopped" and page.text("start") == "Start"


def test_closing_the_page_frees_the_place(page: Browser, until: Until, engine: FakeEngine, http: httpx2.Client) -> None:
    started(page, until)
    playing(page, until)
    page.call("Page.navigate", url="about:blank")
    until(lambda: not engine.sessions, "the place is free", seconds=25)

    def ends() -> list[str]:
        found = [video["status"] for video in http.get("/v1/videos").json()["data"]]
        return found if found != ["in_progress"] else []

    assert until(ends, "nobody waits for it") == ["cancelled"]


def test_a_short_video_plays_to_its_end_and_its_finished_file_is_saved(
    page: Browser, until: Until, ffprobe: str, tmp_path: Path, http: httpx2.Client
) -> None:
    ready(page, until)
    page.save_into(tmp_path)
    page.run("document.getElementById('seconds').value = 2")
    started(page, until)
    until(lambda: page.text("state") == "finished", "finished")
    assert page.run("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames") >= 24
    click(page, "save")
    file = saved(tmp_path, until)
    assert frames_of(ffprobe, file) == 32
    video = http.get("/v1/videos").json()["data"][0]["id"]
    assert file.read_bytes() == http.get(f"/v1/videos/{video}/content").content


def test_an_endless_stream_goes_on_and_what_came_so_far_is_saved(
    page: Browser, until: Until, ffprobe: str, tmp_path: Path, http: httpx2.Client
) -> None:
    ready(page, until)
    page.save_into(tmp_path)
    click(page, "endless")
    started(page, until)
    playing(page, until)
    plays_on(page, until, 2.0)
    assert http.get("/v1/videos").json()["data"][0]["endless"]
    assert " of " not in page.text("shown")
    click(page, "save")
    frames = frames_of(ffprobe, saved(tmp_path, until))
    assert frames >= 33 and (frames - 9) % 12 == 0
    assert page.text("state") == "playing"


def test_what_was_played_long_ago_leaves_the_browsers_memory(page: Browser, until: Until) -> None:
    ready(page, until)
    click(page, "endless")
    started(page, until)
    playing(page, until)
    page.run("document.getElementById('video').playbackRate = 8")
    until(lambda: played_s(page) > 60, "a minute is played", seconds=90)
    start_s = "document.getElementById('video').buffered.start(0)"
    until(lambda: played_s(page) - float(page.run(start_s)) < 45, "what was played is dropped")
    assert page.text("error") == ""


def test_a_browser_that_has_the_managed_source_alone_plays_too(page: Browser, until: Until) -> None:
    ready(page, until)
    only = "window.ManagedMediaSource = window.MediaSource; delete window.MediaSource; window.renamed = true"
    page.call("Page.enable")
    page.call("Page.addScriptToEvaluateOnNewDocument", source=only)
    page.call("Page.reload")
    until(lambda: page.run("Boolean(window.renamed && !window.MediaSource)"), "the page is loaded again")
    started(page, until)
    playing(page, until)
    plays_on(page, until)
    assert page.text("error") == ""


def test_a_browser_that_can_play_none_of_it_says_so(page: Browser, until: Until, engine: FakeEngine) -> None:
    ready(page, until)
    page.run("MediaSource.isTypeSupported = () => false")
    started(page, until)
    until(lambda: "this browser cannot play video/mp4" in page.text("error"), "the reason is told")
    assert page.text("state") == "failed" and played_s(page) == 0
    until(lambda: not engine.sessions, "the place is free", seconds=25)


def test_a_connection_that_is_cut_goes_on_by_its_token(
    open_page: Open, service: Service, until: Until, engine: FakeEngine
) -> None:
    with wire(service.urls[0]) as cable:
        page = open_page(cable.url)
        started(page, until)
        playing(page, until)
        page.run(WATCH_STATE)
        cable.cut()
        plays_on(page, until, 3.0)
        assert "reconnecting…" in page.run("window.told") and page.text("error") == ""
        until(lambda: page.text("state") == "playing", "it plays again")
    assert len({video for video, _ in engine.made}) == 1
    assert [chunk for _, chunk in engine.made] == list(range(len(engine.made)))  # no chunk twice, none left out


def test_a_prompt_changed_while_the_connection_was_lost_is_shown_all_the_same(
    open_page: Open, service: Service, until: Until
) -> None:
    with wire(service.urls[0]) as cable:
        page = open_page(cable.url)
        started(page, until)
        until(lambda: shows(page, FIRST), "the first prompt is on screen")
        cable.upstream = "http://127.0.0.1:9"  # nobody is there
        cable.cut()
        until(lambda: page.text("state") == "reconnecting…", "the loss is told")
        page.type(SECOND)
        page.press("Enter")
        cable.upstream = service.urls[1]
        until(lambda: shows(page, SECOND), "the second prompt is on screen")
        assert page.text("error") == ""


def test_a_gateway_that_drains_is_left_for_another_one_at_once(
    open_page: Open, service: Service, until: Until, engine: FakeEngine
) -> None:
    with wire(service.urls[0]) as cable:
        page = open_page(cable.url)
        started(page, until)
        playing(page, until)
        cable.upstream = service.urls[1]  # new connections come to a gateway that stays, as a proxy's do
        page.run(WATCH_STATE)
        service.run(service.gateways[0].drain())
        plays_on(page, until, 2.0)
        assert "reconnecting…" in page.run("window.told") and page.text("error") == ""
    assert len({video for video, _ in engine.made}) == 1


def test_a_session_that_is_lost_for_good_is_told(page: Browser, until: Until, http: httpx2.Client) -> None:
    started(page, until)
    playing(page, until)
    http.delete(f"/v1/videos/{http.get('/v1/videos').json()['data'][0]['id']}")
    until(lambda: page.text("state") == "failed", "the end is told")
    assert page.text("error") == "the video was removed" and page.text("start") == "Start"


def test_a_killed_replica_shows_at_most_a_short_stall(
    open_page: Open, make_cluster: Callable[..., Cluster], until: Until
) -> None:
    cluster = make_cluster()
    page = open_page(cluster.urls[0])
    started(page, until)
    playing(page, until)
    with http_client(cluster.urls[0]) as http:
        video = http.get("/v1/videos").json()["data"][0]["id"]
    cluster.kill_holder(video)
    plays_on(page, until, 4.0)
    stalled = page.text("stalls")
    assert stalled == "0" or float(stalled.split("·")[1].removesuffix(" s")) < 5.0
    assert page.text("error") == "" and page.text("state") in ("playing", "waiting")


def test_a_full_server_is_told_on_the_page(
    page: Browser, until: Until, http: httpx2.Client, engine: FakeEngine
) -> None:
    engine.allow(0)
    for _ in range(2):
        http.post("/v1/videos", json={"prompt": FIRST})
    started(page, until)
    until(lambda: "every session slot is in use" in page.text("error"), "the error is shown")
    assert "again in 3 s" in page.text("error") and page.text("start") == "Start"


def test_a_video_that_fails_is_told_on_the_page(page: Browser, until: Until, engine: FakeEngine) -> None:
    engine.fail_at = 3
    started(page, until)
    until(lambda: page.text("state") == "failed", "the failure is shown")
    assert page.text("error") == "generation failed"


def test_with_keys_it_asks_for_one_and_keeps_it_in_the_tab_alone(
    open_page: Open, guarded: Service, key: Keyed, until: Until, ffprobe: str, tmp_path: Path
) -> None:
    page = open_page(guarded.urls[0])
    page.save_into(tmp_path)
    until(lambda: page.run("document.activeElement?.id") == "key", "it asks for a key")
    page.type("dk_wrong")
    page.press("Enter")
    until(lambda: "not known" in page.text("key-error"), "a wrong key is told")
    assert page.run("sessionStorage.length") == 0
    text = key()["Authorization"].removeprefix("Bearer ")
    page.type(text)
    page.press("Enter")
    ready(page, until)
    page.run("document.getElementById('seconds').value = 2")
    started(page, until)
    until(lambda: page.text("state") == "finished", "finished")
    click(page, "save")
    assert frames_of(ffprobe, saved(tmp_path, until)) == 32  # the file, too, is fetched with the key
    held = page.run("[location.href, document.cookie, localStorage.length, document.documentElement.outerHTML]")
    assert text not in json.dumps(held) and held[2] == 0
    assert page.run("Object.values(sessionStorage)") == [text]
    click(page, "forget-key")
    until(lambda: page.run("document.activeElement?.id") == "key", "it asks again")
    assert page.run("sessionStorage.length") == 0


def test_of_several_models_the_one_that_is_chosen_makes_the_stream(
    open_page: Open, tmp_path: Path, until: Until
) -> None:
    service = SideBySide(ServeSettings(data=str(tmp_path / "data")), FakeEngine())
    service.start()
    try:
        page = open_page(service.urls[0])
        ready(page, until)
        assert page.run("[...document.querySelectorAll('#model-choice option')].map(one => one.value)") == [
            "stable",
            "next",
        ]
        page.run(
            "{ const c = document.getElementById('model-choice'); c.value = 'next'; "
            "c.dispatchEvent(new Event('change')); }"
        )
        started(page, until, "a red circle moves left")
        playing(page, until)
        with http_client(service.urls[0]) as http:
            assert http.get("/v1/videos").json()["data"][0]["model"] == "next"
    finally:
        service.stop()


def test_everything_is_done_by_the_keyboard_alone_and_every_control_has_a_name(
    page: Browser, until: Until, engine: FakeEngine
) -> None:
    ready(page, until)
    page.tab_to("endless")
    page.press(" ")
    page.tab_to("prompt")
    page.type(FIRST)
    page.press("Enter")
    playing(page, until)
    page.press("p", alt=True)
    until(lambda: page.text("state") == "paused", "paused by Alt+P")
    page.tab_to("pause")
    page.press(" ")
    playing(page, until)
    page.tab_to("stop")
    page.press("Enter")
    until(lambda: not engine.sessions, "the place is free", seconds=25)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "textbox", "spinbutton", "switch", "combobox", "checkbox")
    ]
    assert len(controls) >= 10
    assert all(node.get("name", {}).get("value") for node in controls), controls


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_nothing_is_cut_off_and_text_can_be_read(
    page: Browser, until: Until, tmp_path: Path, width: int, scheme: str
) -> None:
    page.look(width, 800, scheme)
    started(page, until)
    playing(page, until)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(CONTRASTS) == []
    page.screenshot(tmp_path / f"{width}-{scheme}.png")


CONTRASTS = """(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const colour = getComputedStyle(element).backgroundColor;
    const seen = !/, 0\\)$/.test(colour) && colour !== "transparent";
    return seen || !element.parentElement ? colour : ground(element.parentElement);
  };
  const poor = [];
  for (const element of document.querySelectorAll("label, h1, h2, dt, dd, p, button, li span, textarea")) {
    if (!element.textContent.trim() || element.disabled || !element.checkVisibility()) continue;
    if (element.closest(".stage")) continue;
    const pair = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) poor.push([element.id || element.className || element.tagName, ratio.toFixed(2)]);
  }
  return poor;
})()"""
