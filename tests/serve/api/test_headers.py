"""What answers say in their headers: ranges and conditions of a file, and what is left of a key's quotas."""

from __future__ import annotations

import re

import httpx2
import pytest

from tests.serve.harness import (
    FakeEngine,
    Keyed,
    Service,
    Until,
    finished,
    first_s,
    fragments,
    http_client,
    shades,
    start,
)
from tests.serve.sockets import viewer


@pytest.fixture
def file(http: httpx2.Client, until: Until) -> tuple[str, bytes]:
    """Path and bytes of a finished file."""
    path = f"/v1/videos/{finished(http, until, num_frames=33)['id']}/content"
    return path, http.get(path).content


def test_a_range_is_those_bytes_of_the_file(http: httpx2.Client, file: tuple[str, bytes]) -> None:
    path, whole = file
    size = len(whole)
    wanted = {"0-0": (0, 1), "5-99": (5, 100), "-7": (size - 7, size), f"{size - 3}-": (size - 3, size)}
    wanted |= {f"10-{10 * size}": (10, size), f"-{10 * size}": (0, size)}
    for text, (first, stop) in wanted.items():
        answer = http.get(path, headers={"Range": f"bytes={text}"})
        assert answer.status_code == 206, text
        assert answer.content == whole[first:stop]
        assert answer.headers["content-range"] == f"bytes {first}-{stop - 1}/{size}"
        assert int(answer.headers["content-length"]) == stop - first


@pytest.mark.parametrize(
    "text", ["bytes=0-1,5-6", "bytes=9-3", "bytes=-", "bytes=a-b", "pages=1-2", "", f"bytes={'1' * 40}-"]
)
def test_a_range_that_is_none_or_several_is_answered_by_the_whole(
    http: httpx2.Client, file: tuple[str, bytes], text: str
) -> None:
    answer = http.get(file[0], headers={"Range": text})
    assert (answer.status_code, answer.content) == (200, file[1])
    assert answer.headers["accept-ranges"] == "bytes"


def test_a_range_behind_the_end_is_told_with_the_size(http: httpx2.Client, file: tuple[str, bytes]) -> None:
    for text in (f"{len(file[1])}-", "999999999-", "-0"):
        answer = http.get(file[0], headers={"Range": f"bytes={text}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{len(file[1])}"


def test_a_download_that_was_cut_off_goes_on_only_in_the_same_file(
    http: httpx2.Client, file: tuple[str, bytes]
) -> None:
    path, whole = file
    etag = http.get(path).headers["etag"]
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', etag)  # strong
    same = http.get(path, headers={"Range": "bytes=9-", "If-Range": etag})
    assert (same.status_code, same.content) == (206, whole[9:])
    for other in ('"another"', f"W/{etag}", "Sat, 29 Oct 1994 19:43:31 GMT"):
        answer = http.get(path, headers={"Range": "bytes=9-", "If-Range": other})
        assert (answer.status_code, answer.content) == (200, whole)


def test_a_file_that_is_known_is_not_sent_again(http: httpx2.Client, file: tuple[str, bytes]) -> None:
    etag = http.get(file[0]).headers["etag"]
    for condition in (etag, f'"x", W/{etag}', "*"):
        answer = http.get(file[0], headers={"If-None-Match": condition})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert http.get(file[0], headers={"If-None-Match": '"x"'}).status_code == 200


def test_head_tells_the_headers_alone(http: httpx2.Client, file: tuple[str, bytes]) -> None:
    said, answer = http.get(file[0]).headers, http.head(file[0])
    assert (answer.status_code, answer.content) == (200, b"")
    for name in ("content-length", "content-type", "etag", "accept-ranges", "content-disposition"):
        assert answer.headers[name] == said[name]
    assert http.head(file[0], headers={"Range": "bytes=3-5"}).headers["content-length"] == "3"
    assert http.head("/v1/videos/video_none/content").status_code == 404


def test_a_stream_from_a_later_chunk_on_begins_with_its_head_and_keeps_its_time(
    http: httpx2.Client, until: Until
) -> None:
    video = finished(http, until, num_frames=81)["id"]
    whole = http.get(f"/v1/videos/{video}/stream").content
    later = http.get(f"/v1/videos/{video}/stream", params={"start_chunk": 3}).content
    head = whole[: whole.index(b"moof") - 4]
    assert later.startswith(head) and whole.endswith(later[len(head) :])
    assert list(fragments(iter([later]), bytearray())) == ["ftyp", "moov"] + ["moof", "mdat"] * 4
    assert first_s(later) == 33 / 16 and first_s(whole) == 0
    assert len(shades(later)) == 48


def test_a_chunk_behind_the_end_is_told(http: httpx2.Client, engine: FakeEngine, until: Until) -> None:
    done = finished(http, until, num_frames=81)["id"]
    engine.allow(1)
    running = start(http)
    for video in (done, running):
        for chunk, status in ((7, 422), (2**31 - 1, 422), (2**31, 422), (-1, 422)):
            answer = http.get(f"/v1/videos/{video}/stream", params={"start_chunk": chunk})
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, "start_chunk")


def told(answer: httpx2.Response) -> tuple[str, dict[str, dict[str, int]]]:
    """The policies, and what is left: each policy's parameters."""
    left = {}
    for item in answer.headers["ratelimit"].split(", "):
        name, *parameters = item.split(";")
        left[name.strip('"')] = {part[0]: int(part[2:]) for part in parameters}
    return answer.headers["ratelimit-policy"], left


def test_what_is_left_of_a_quota_is_told_with_each_video_and_each_refusal(
    guarded: Service, key: Keyed, engine: FakeEngine
) -> None:
    engine.allow(0)
    mine = key(sessions=2, frames_per_minute=50)
    with http_client(guarded.urls[0], mine) as http:
        policy, left = told(http.post("/v1/videos", json={"prompt": "x", "num_frames": 21}))
        assert policy == '"frames";q=50;w=60, "sessions";q=2;qu="concurrent-requests"'
        assert left["sessions"] == {"r": 1} and left["frames"]["r"] == 29 and 55 <= left["frames"]["t"] <= 60
        refused = http.post("/v1/videos", json={"prompt": "x", "num_frames": 30})
        assert refused.status_code == 429 and told(refused)[1]["frames"]["r"] == 29
        assert 50 <= int(refused.headers["retry-after"]) <= 60
        assert "ratelimit" not in http.get("/v1/videos").headers


def test_a_key_without_limits_is_told_none(http: httpx2.Client, service: Service) -> None:
    answer = http.post("/v1/videos", json={"prompt": "x", "num_frames": 9})
    assert "ratelimit" not in answer.headers and "ratelimit-policy" not in answer.headers
    with viewer(service.urls[0]) as one:
        assert one.start(num_frames=9)["type"] == "video.start"
