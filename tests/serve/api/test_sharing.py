"""Sharing a video: links that watch or steer that one video and do nothing else, for as long as their owner says."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import segno

from serve.api.auth import REQUESTS_AT_ONCE, SHARED_FOLDER
from serve.records import MAX_VIEWERS
from serve.wire import schemas
from tests.serve.api.test_hls import entries
from tests.serve.harness import FakeEngine, Keyed, Service, Until, http_client, shade, shades
from tests.serve.hostile import new_key, start, told

CANARY = "CANARYPROMPT of a heron"


@pytest.fixture
def owner(guarded: Service) -> Iterator[httpx2.Client]:
    with http_client(guarded.urls[0], new_key(guarded)) as client:
        yield client


@pytest.fixture
def stranger(guarded: Service) -> Iterator[httpx2.Client]:
    """Somebody without a key."""
    with http_client(guarded.urls[1]) as client:
        yield client


def shared(owner: httpx2.Client, video: str, **asked: Any) -> dict[str, Any]:
    return dict(owner.post(f"/v1/videos/{video}/viewers", json=asked).raise_for_status().json())


def finished(owner: httpx2.Client, until: Until, **fields: Any) -> str:
    video = start(owner, **fields)
    until(lambda: told(owner, video)["status"] == "completed", "completed")
    return video


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def steer(http: httpx2.Client, token: str, **event: Any) -> httpx2.Response:
    return http.post(f"/v1/shared/{token}/interactions", json={"interaction": {"event": event}})


def every_way(http: httpx2.Client, token: str) -> Iterator[httpx2.Response]:
    """Whatever a link leads to."""
    for path in ("", "/index.m3u8", "/init.mp4", "/chunks/0.m4s", "/content"):
        yield http.get(f"/v1/shared/{token}{path}")
    yield http.head(f"/v1/shared/{token}/content")
    yield steer(http, token, prompt="x")


def test_a_link_plays_the_video_and_caches_may_keep_what_it_leads_to(
    owner: httpx2.Client, stranger: httpx2.Client, until: Until
) -> None:
    video = finished(owner, until, prompt=CANARY)
    link = shared(owner, video, expires_in_s=3600)
    answer = stranger.get(f"/{link['playlist_path']}")
    addresses = ["init.mp4", *(address for _, address in entries(answer.text))]
    folder = link["playlist_path"].rpartition("/")[0]
    parts = [stranger.get(f"/{folder}/{address}") for address in addresses]
    assert b"".join(part.content for part in parts) == owner.get(f"/v1/videos/{video}/stream").content
    file = stranger.get(f"/{folder}/content")
    assert file.content == owner.get(f"/v1/videos/{video}/content").content
    kept = {one.headers["cache-control"] for one in (answer, *parts, file)}
    assert kept == {"public, max-age=300, immutable"}
    part = stranger.get(f"/{folder}/content", headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    about = stranger.get(f"/{folder}")
    assert (about.json()["role"], about.json()["status"]) == ("watch", "completed")
    assert CANARY not in about.text and about.headers["cache-control"] == "no-store"


def test_a_live_playlist_is_kept_for_a_moment_and_an_error_never(
    owner: httpx2.Client, stranger: httpx2.Client, guarded: Service
) -> None:
    guarded.engine.allow(1)
    video = start(owner, num_frames=81)
    at = f"/v1/shared/{shared(owner, video)['token']}"
    plain, awaited = stranger.get(f"{at}/index.m3u8"), stranger.get(f"{at}/index.m3u8?_HLS_msn=0")
    assert len(entries(plain.text)) == 1
    assert plain.headers["cache-control"] == "public, max-age=1, stale-while-revalidate=1"
    assert awaited.headers["cache-control"] == "public, max-age=6"
    assert stranger.get(f"{at}/chunks/0.m4s").headers["cache-control"] == "public, max-age=300, immutable"
    for missing in (stranger.get(f"{at}/chunks/5.m4s"), stranger.get(f"{at}/index.m3u8?_HLS_msn=40")):
        assert missing.status_code in (400, 404) and missing.headers["cache-control"] == "no-store"


def test_nothing_is_kept_for_longer_than_the_token_lasts(
    owner: httpx2.Client, stranger: httpx2.Client, until: Until
) -> None:
    token = shared(owner, finished(owner, until), expires_in_s=20)["token"]
    answer = stranger.get(f"/v1/shared/{token}/init.mp4")
    assert answer.headers["cache-control"] in {f"public, max-age={left}, immutable" for left in (18, 19)}


def test_an_owner_lists_and_revokes_his_viewers(owner: httpx2.Client, until: Until) -> None:
    video = finished(owner, until)
    one, other = shared(owner, video, name="Ann", role="steer"), shared(owner, video)
    assert one["expires_at"] - one["created_at"] == schemas.SHARED_S and one["token"].startswith(f"vt_{one['id']}_")
    found = owner.get(f"/v1/videos/{video}/viewers").json()["data"]
    assert [(viewer["id"], viewer["role"], viewer["name"]) for viewer in found] == [
        (one["id"], "steer", "Ann"),
        (other["id"], "watch", other["id"]),
    ]
    assert not {"token", "hash", "watch_path"} & set(found[0])
    assert owner.delete(f"/v1/videos/{video}/viewers/{one['id']}").json()["deleted"] is True
    assert [viewer["id"] for viewer in owner.get(f"/v1/videos/{video}/viewers").json()["data"]] == [other["id"]]
    assert code(owner.delete(f"/v1/videos/{video}/viewers/{one['id']}")) == (404, "viewer_not_found")


def test_a_viewer_who_steers_is_named_with_his_change(
    owner: httpx2.Client, stranger: httpx2.Client, guarded: Service, until: Until
) -> None:
    guarded.engine.allow(1)
    video = start(owner, num_frames=33)
    token = shared(owner, video, role="steer", name="Ann")["token"]
    answer = steer(stranger, token, prompt="a blue square")
    assert answer.status_code == 202
    own = owner.post(
        f"/v1/videos/{video}/interactions", json={"interaction": {"event": {"prompt": "a green triangle"}}}
    )
    assert own.status_code == 202
    guarded.engine.allow(float("inf"))
    until(lambda: told(owner, video)["status"] == "completed", "completed")
    changes = {change["event_id"]: change["made_by"] for change in told(owner, video)["interactions"]}
    assert changes == {answer.json()["event_id"]: "Ann", own.json()["event_id"]: None}
    assert abs(shades(owner.get(f"/v1/videos/{video}/content").content)[-1] - shade("a green triangle")) <= 6
    assert code(steer(stranger, token, action="pause")) == (403, "prompt_only")
    assert code(steer(stranger, token, prompt="x")) == (409, "video_over")


def test_a_qr_code_leads_to_the_watch_page(owner: httpx2.Client, until: Until) -> None:
    video = finished(owner, until)
    assert shared(owner, video)["qr"] is None
    link = shared(owner, video, qr_for="https://videos.example/live/")
    modules = ElementTree.fromstring(link["qr"])
    assert modules.tag == "{http://www.w3.org/2000/svg}svg" and link["token"] not in link["qr"]
    wanted = segno.make(f"https://videos.example/live/{link['watch_path']}", error="m", micro=False)
    assert ElementTree.fromstring(wanted.svg_inline(omitsize=True))[0].get("d") == modules[0].get("d")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "own"),
        ("role", None),
        ("expires_in_s", 0),
        ("expires_in_s", schemas.MAX_SHARED_S + 1),
        ("expires_in_s", 1.5),
        ("expires_in_s", "60"),
        ("name", "x" * 65),
        ("name", "a\x00b"),
        ("name", "a\nb"),
        ("qr_for", "javascript:alert(1)"),
        ("qr_for", "https://a b"),
        ("qr_for", "https://" + "x" * 600),
        ("video", "video_x"),
    ],
)
def test_what_is_asked_wrongly_is_named(idle_http: httpx2.Client, field: str, value: object) -> None:
    answer = idle_http.post("/v1/videos/video_x/viewers", json={field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, field), answer.text


def test_a_video_has_a_bounded_number_of_viewers(owner: httpx2.Client, until: Until) -> None:
    assert MAX_VIEWERS == 100
    video = finished(owner, until)
    made = [shared(owner, video)["id"] for _ in range(MAX_VIEWERS)]
    assert code(owner.post(f"/v1/videos/{video}/viewers")) == (409, "too_many_viewers")
    owner.delete(f"/v1/videos/{video}/viewers/{made[0]}").raise_for_status()
    shared(owner, video)


def test_19_a_link_that_is_over_or_never_was_is_404_and_tells_no_difference(
    owner: httpx2.Client, stranger: httpx2.Client, until: Until
) -> None:
    video, removed = finished(owner, until), finished(owner, until)
    revoked, late = shared(owner, video), shared(owner, video, expires_in_s=1)
    gone = shared(owner, removed)
    owner.delete(f"/v1/videos/{video}/viewers/{revoked['id']}").raise_for_status()
    owner.delete(f"/v1/videos/{removed}").raise_for_status()
    time.sleep(1.1)
    fresh = shared(owner, video)["token"]
    wrong = [revoked["token"], late["token"], gone["token"], fresh[:-1] + ("a" if fresh[-1] != "a" else "b")]
    wrong += [fresh + "x", "vt_0_x", "vt__", "x", "dk_local_of-the-tests", "vt_%00_x", "vt_é_x", "vt_' OR 1=1 --_x"]
    bodies = set()
    for token in wrong:
        for answer in every_way(stranger, token):
            assert answer.status_code == 404, token
            if answer.request.method != "HEAD":
                bodies.add(json.dumps({**answer.json(), "request_id": ""}))
    assert len(bodies) == 1 and "link_not_found" in bodies.pop()
    assert [answer.status_code for answer in every_way(stranger, fresh)] == [200] * 6 + [403]


def test_19_a_watch_link_changes_nothing_and_shows_one_video_alone(
    owner: httpx2.Client, stranger: httpx2.Client, guarded: Service, until: Until
) -> None:
    guarded.engine.allow(1)
    video, other = start(owner, num_frames=81), start(owner, num_frames=81)
    link = shared(owner, video)
    assert code(steer(stranger, link["token"], prompt="x")) == (403, "watch_only")
    assert told(owner, video)["interactions"] == []
    headers = {"Authorization": f"Bearer {link['token']}"}
    paths = ["/v1/videos", f"/v1/videos/{video}", f"/v1/videos/{other}", f"/v1/videos/{video}/viewers", "/v1/models"]
    paths += [f"/v1/videos/{video}/{one}" for one in ("content", "stream", "chain", "recording", "index.m3u8")]
    assert {stranger.get(path, headers=headers).status_code for path in paths} == {401}
    started = stranger.post("/v1/videos", headers=headers, json={"prompt": "x"})
    assert started.status_code == 401
    at = f"/v1/shared/{link['token']}"
    for method, path in (("DELETE", ""), ("POST", ""), ("POST", "/viewers"), ("GET", "/chain"), ("GET", "/recording")):
        assert stranger.request(method, at + path, json={"prompt": "x"}).status_code in (404, 405)
    assert stranger.get(f"{at}/../../videos/{other}/content").status_code in (401, 404)
    steering = shared(owner, video, role="steer")["token"]
    assert steer(stranger, steering, prompt="a blue square").status_code == 202
    assert told(owner, other)["interactions"] == [] and len(guarded.engine.sessions) == 2


def test_19_another_keys_video_is_not_shared_and_its_viewers_are_not_told(
    owner: httpx2.Client, stranger: httpx2.Client, key: Keyed, until: Until
) -> None:
    theirs, video = key("they"), finished(owner, until)
    viewer = shared(owner, video)["id"]
    at = f"/v1/videos/{video}/viewers"
    for method, path in (("POST", at), ("GET", at), ("DELETE", f"{at}/{viewer}")):
        assert code(stranger.request(method, path, headers=theirs)) == (404, "video_not_found")
    own = start(stranger, theirs)
    answer = stranger.delete(f"/v1/videos/{own}/viewers/{viewer}", headers=theirs)
    assert code(answer) == (404, "viewer_not_found")


def test_19_links_end_with_their_owners_key(
    owner: httpx2.Client, stranger: httpx2.Client, guarded: Service, until: Until
) -> None:
    token = shared(owner, finished(owner, until))["token"]
    guarded.store._credentials.revoke_key(owner.headers["authorization"].split("_")[1], time.time())
    assert {answer.status_code for answer in every_way(stranger, token)} == {404}


@pytest.mark.slow
def test_19_the_viewers_of_a_video_cannot_take_all_connections(
    make_service: Callable[..., Service], engine: FakeEngine
) -> None:
    """Each waits for a chunk that does not come; whoever has a key is served meanwhile."""
    service = make_service(auth="keys", gateways=1)
    engine.allow(1)
    limits = httpx2.Limits(max_connections=None)

    async def crowd(address: str) -> list[int]:
        async with httpx2.AsyncClient(timeout=60, verify=False, limits=limits) as http:
            waiting = [http.get(address) for _ in range(REQUESTS_AT_ONCE + 20)]
            return [answer.status_code for answer in await asyncio.gather(*waiting)]

    with http_client(service.urls[0], new_key(service)) as owner:
        video = start(owner, num_frames=81)
        token = shared(owner, video)["token"]
        found: list[int] = []
        address = f"{service.urls[0]}/v1/shared/{token}/index.m3u8?_HLS_msn=2"
        thread = threading.Thread(target=lambda: found.extend(asyncio.run(crowd(address))))
        thread.start()
        time.sleep(1.0)
        assert told(owner, video)["status"] == "in_progress"
        thread.join(60)
    assert found.count(429) == 20 and set(found) == {429, 503}


def test_14_a_token_is_in_no_log_no_metric_and_no_file(
    make_service: Callable[..., Service],
    until: Until,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    service = make_service(auth="keys")
    with http_client(service.urls[0], new_key(service)) as owner, http_client(service.urls[0]) as stranger:
        link = shared(owner, finished(owner, until), role="steer")
        for answer in every_way(stranger, link["token"]):
            assert answer.status_code in (200, 409)
        stranger.get(f"/watch/{link['token']}").raise_for_status()
        stranger.get(f"/v1/shared/{link['token']}/nothing")
        owner.delete(f"/v1/videos/{link['video_id']}/viewers/{link['id']}").raise_for_status()
        assert stranger.get(f"/v1/shared/{link['token']}").status_code == 404
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx2", "httpcore"))]
    secret = link["token"].split("_", 2)[2]
    assert secret not in "\n".join(ours) + "".join(capfd.readouterr()) + str(service.metrics.records)
    files = [path for path in Path(service.settings.data).rglob("*") if path.is_file()]
    assert files and not any(secret.encode() in path.read_bytes() for path in files)
    lines = [json.loads(line.removeprefix("request ")) for line in ours if line.startswith("request {")]
    assert {line["viewer"] for line in lines if str(line["route"]).startswith(SHARED_FOLDER) and line["viewer"]} == {
        link["id"]
    }
