"""HTTP Live Streaming: playlists while a video is made and after, chunk by chunk the stream's bytes, a real player."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable

import httpx2
import pytest

from serve.gateway import hls
from serve.gateway.hls import playlist
from tests.conftest import need_program
from tests.serve.harness import FakeEngine, Service, Until, http_client, start, status
from tests.serve.sockets import LOCAL_TOKEN


def entries(text: str) -> list[tuple[float, str]]:
    """Duration and address of each chunk of a playlist."""
    return [(float(seconds), address) for seconds, address in re.findall(r"#EXTINF:([\d.]+),\n(\S+)", text)]


def test_the_text_is_what_the_specification_asks_for() -> None:
    text = playlist([9, 12, 5], 16, 1, ended=True, endless=False)
    assert text.startswith("#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:1\n")
    assert '#EXT-X-MAP:URI="init.mp4"\n' in text and text.endswith("chunks/2.m4s\n#EXT-X-ENDLIST\n")
    assert entries(text) == [(0.5625, "chunks/0.m4s"), (0.75, "chunks/1.m4s"), (0.3125, "chunks/2.m4s")]
    assert "#EXT-X-PLAYLIST-TYPE:VOD" in text and "HOLD-BACK=3.0" in text and "DISCONTINUITY" not in text
    live = playlist([9], 16, 1, ended=False, endless=False)
    assert "#EXT-X-PLAYLIST-TYPE:EVENT" in live and "ENDLIST" not in live
    window = playlist([12, 12], 16, 1, first=40, ended=False, endless=True)
    assert "#EXT-X-MEDIA-SEQUENCE:40" in window and "PLAYLIST-TYPE" not in window and "chunks/41.m4s" in window
    assert all(seconds <= hls.target_s(12, 16) for seconds, _ in entries(window))


def test_a_finished_video_is_the_streams_bytes_chunk_by_chunk(http: httpx2.Client, until: Until) -> None:
    video = start(http)
    stream = http.get(f"/v1/videos/{video}/stream").content
    until(lambda: status(http, video)["status"] == "completed", "completed")
    answer = http.get(f"/v1/videos/{video}/index.m3u8")
    assert answer.headers["content-type"] == hls.MEDIA_TYPE and "immutable" in answer.headers["cache-control"]
    found = entries(answer.text)
    parts = [http.get(f"/v1/videos/{video}/{name}") for name in ("init.mp4", *(address for _, address in found))]
    assert b"".join(part.content for part in parts) == stream
    assert {part.headers["cache-control"] for part in parts} == {"private, max-age=3600, immutable"}
    assert sum(seconds for seconds, _ in found) == pytest.approx(81 / 16, abs=1e-3)
    beyond = http.get(f"/v1/videos/{video}/chunks/{len(found)}.m4s")
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (404, "no_such_chunk")


def test_a_live_playlist_grows_and_a_reload_waits_for_its_chunk(http: httpx2.Client, engine: FakeEngine) -> None:
    engine.allow(1)
    video = start(http)
    first = http.get(f"/v1/videos/{video}/index.m3u8")
    assert len(entries(first.text)) == 1 and "EVENT" in first.text and first.headers["cache-control"] == "no-cache"
    threading.Timer(0.3, engine.allow, (2,)).start()
    assert len(entries(http.get(f"/v1/videos/{video}/index.m3u8?_HLS_msn=1").text)) >= 2
    far = http.get(f"/v1/videos/{video}/index.m3u8?_HLS_msn=40")
    assert (far.status_code, far.json()["error"]["param"]) == (400, "_HLS_msn")
    early = http.get(f"/v1/videos/{video}/chunks/5.m4s")
    assert (early.status_code, early.json()["error"]["code"]) == (404, "no_such_chunk")


def test_a_finished_videos_playlist_and_chunks_need_no_replica(
    service: Service, http: httpx2.Client, other_http: httpx2.Client, until: Until
) -> None:
    video = start(http)
    until(lambda: status(http, video)["status"] == "completed", "completed")
    service.run(service.kill_replica("replica-1"))
    text = other_http.get(f"/v1/videos/{video}/index.m3u8").raise_for_status().text
    assert "#EXT-X-ENDLIST" in text and len(entries(text)) == 7
    assert {other_http.get(f"/v1/videos/{video}/chunks/{chunk}.m4s").status_code for chunk in range(7)} == {200}


def test_who_waits_for_a_playlist_reads_no_chunks(service: Service, http: httpx2.Client, engine: FakeEngine) -> None:
    engine.allow(1)
    video, files = start(http), service.store._files
    http.get(f"/v1/videos/{video}/index.m3u8").raise_for_status()
    read, was = list[str](), files.read

    def noted(video_id: str, name: str) -> bytes:
        read.append(name)
        return bytes(was(video_id, name))

    files.read = noted
    threading.Timer(0.3, engine.allow, (1,)).start()
    assert len(entries(http.get(f"/v1/videos/{video}/index.m3u8?_HLS_msn=1").text)) == 2
    assert read == []
    http.get(f"/v1/videos/{video}/chunks/1.m4s").raise_for_status()
    assert [name.partition("-")[0] for name in read] == ["1"]


def test_who_plays_by_hls_keeps_a_realtime_video_going(http: httpx2.Client, until: Until) -> None:
    """Its playlist and chunks are its only reader; without them it would be cancelled."""
    video, seen = start(http, pacing="realtime"), 0
    while "#EXT-X-ENDLIST" not in (text := http.get(f"/v1/videos/{video}/index.m3u8?_HLS_msn={seen}").text):
        assert len(entries(text)) > seen, text
        assert http.get(f"/v1/videos/{video}/chunks/{seen}.m4s").status_code == 200
        seen += 1
    assert status(http, video)["status"] == "completed" and len(entries(text)) == 7


@pytest.mark.parametrize("path", ["index.m3u8", "init.mp4", "chunks/0.m4s"])
def test_another_keys_video_is_not_there(guarded: Service, key: Callable[..., dict[str, str]], path: str) -> None:
    with httpx2.Client(base_url=guarded.urls[0], timeout=30) as http:
        mine, theirs = key(), key()
        video = http.post("/v1/videos", json={"prompt": "x"}, headers=mine).json()["id"]
        assert http.get(f"/v1/videos/{video}/{path}").status_code == 401
        answer = http.get(f"/v1/videos/{video}/{path}", headers=theirs)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")


@pytest.mark.slow
def test_ffmpeg_plays_a_live_video_to_its_end(make_service: Callable[..., Service]) -> None:
    service = make_service(reader_start_timeout_s=20.0)
    with http_client(service.urls[0]) as http:
        video = start(http, pacing="realtime")
    command = [need_program("ffprobe"), "-v", "error", "-headers", f"Authorization: Bearer {LOCAL_TOKEN}\r\n"]
    command += ["-count_frames", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0", "-extension_picky", "0"]
    address = f"{service.urls[0]}/v1/videos/{video}/index.m3u8"
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=60)
    if "extension_picky" in done.stderr:  # an older ffmpeg, which asks no such thing
        done = subprocess.run([*command[:-2], address], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[0].strip(",") == "81", done.stderr
