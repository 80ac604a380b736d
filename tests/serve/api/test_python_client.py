"""The Python client against the running service, over real sockets: live sessions, streams, broken connections."""

from __future__ import annotations

import asyncio
import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx2
import pytest

from diagonal.client import (
    AsyncRealtime,
    DiagonalClient,
    NoAnswerError,
    RefusedError,
    ServerFullError,
    VideoFailedError,
)
from diagonal.client.files import part_of
from diagonal.client.protocol import start_fields
from tests.serve.harness import FakeEngine, Service, Until


@pytest.fixture
def client(service: Service) -> Iterator[DiagonalClient]:
    with DiagonalClient(service.urls[0], max_retries=0) as client:
        yield client


def frames_of(data: bytes) -> int:
    with av.open(io.BytesIO(data), mode="r") as container:
        return sum(1 for _ in container.decode(video=0))


def cut(live: Any) -> None:
    """The network is gone, without a word."""
    live._socket.socket.shutdown(2)


def test_a_live_session_gives_every_chunk_once(client: DiagonalClient) -> None:
    with client.realtime("a red circle", frames=81, seed=3, pacing="none") as live:
        assert (live.opening.frames, live.opening.fps, live.opening.seed) == (81, 16, 3)
        chunks = list(live)
    assert [chunk.index for chunk in chunks] == list(range(7)) and live.state.frames == 81
    assert frames_of(b"".join(chunk.data for chunk in chunks)) == 81


def test_a_video_is_shared_with_somebody_without_a_key(client: DiagonalClient, service: Service, until: Until) -> None:
    video = client.create("a red circle", frames=9)
    client.wait(video.id)
    made = client.share(video.id, name="Ann", expires_in_s=60)
    assert made["watch_url"] == f"{service.urls[0]}/watch/{made['token']}"
    assert "#EXT-X-ENDLIST" in httpx2.get(made["playlist_url"]).text
    assert [(one["id"], one["name"]) for one in client.viewers(video.id)] == [(made["id"], "Ann")]
    client.revoke(video.id, made["id"])
    assert client.viewers(video.id) == [] and httpx2.get(made["playlist_url"]).status_code == 404
    with pytest.raises(RefusedError, match="viewer"):
        client.revoke(video.id, made["id"])


@pytest.mark.slow
def test_a_prompt_change_is_told_by_the_chunk_that_it_shows_in(client: DiagonalClient, engine: FakeEngine) -> None:
    engine.allow(2)
    with client.realtime("a red circle", frames=81, pacing="none") as live:
        chunks = iter(live)
        assert [next(chunks).index for _ in range(2)] == [0, 1]
        event = live.change("a blue square", transition_chunks=2)
        wrong = live.change(" ")
        engine.allow(100)
        rest = list(chunks)
        assert (live.changes[event].status, live.changes[event].chunk) == ("completed", rest[0].index)
        assert rest[0].started_events == (event,) and event in rest[1].completed_events
        refused = live.changes[wrong].error
        assert isinstance(refused, RefusedError) and refused.code == "prompt_empty"


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_broken_connection_is_gone_on_with_and_no_chunk_is_lost(client: DiagonalClient, after: int) -> None:
    with client.realtime("a red circle", frames=81, pacing="none", buffer_s=2.0) as live:
        data = b""
        if after == 0:
            cut(live)
        for chunk in live:
            data += chunk.data
            if chunk.index == after - 1:
                cut(live)
    assert live.reconnects >= 1 and live.state.next_chunk == 7 and frames_of(data) == 81


def test_whose_session_was_taken_over_is_told(client: DiagonalClient, engine: FakeEngine) -> None:
    engine.allow(1)
    with client.realtime("a red circle", frames=81) as live, client.realtime("x", frames=81) as other:
        next(iter(live))
        other.state.token, other.state.next_chunk, other.state.frames = live.state.token, 1, 9
        other.open()
        with pytest.raises(RefusedError) as caught:
            list(live)
        assert caught.value.code == "session_taken_over"


def test_no_more_is_made_ahead_of_the_viewer_than_he_asked_for(
    client: DiagonalClient, engine: FakeEngine, until: Until
) -> None:
    with client.realtime("a red circle", frames=320, buffer_s=1.0) as live:
        chunks = iter(live)
        live.tell_position(0.0)
        until(lambda: len(engine.made) == 2, "two chunks")
        assert [next(chunks).index for _ in range(2)] == [0, 1]
        live.tell_position(0.5)
        assert next(chunks).index == 2 and len(engine.made) == 3


def test_a_paused_session_goes_on_when_it_is_resumed(client: DiagonalClient, until: Until) -> None:
    with client.realtime("a red circle", frames=320, buffer_s=1.0) as live:
        chunks = iter(live)
        next(chunks)
        live.pause()
        video = live.opening.request_id
        until(lambda: client.get(video).answer["paused"], "paused")
        live.resume()
        until(lambda: not client.get(video).answer["paused"], "goes on")
        assert [next(chunks).index for _ in range(3)] == [1, 2, 3]


def test_a_stopped_session_ends_whole(client: DiagonalClient, tmp_path: Path) -> None:
    with client.realtime("a red circle", frames=900, buffer_s=1.0) as live:
        chunks = iter(live)
        first = next(chunks)
        live.stop()
        rest = list(chunks)
    assert live.state.stopped and frames_of(first.data + b"".join(chunk.data for chunk in rest)) == live.state.frames


@pytest.mark.slow
def test_a_stream_without_an_end_goes_on_until_it_is_stopped(client: DiagonalClient) -> None:
    with client.realtime("a red circle", endless=True, buffer_s=5.0) as live:
        assert live.opening.frames is None
        for chunk in live:
            if chunk.index == 20:
                live.stop()
    assert live.state.done and live.state.next_chunk > 20


def test_a_saved_session_is_a_video_and_one_that_fails_leaves_what_came(
    client: DiagonalClient, engine: FakeEngine, tmp_path: Path
) -> None:
    path = tmp_path / "x.mp4"
    with client.realtime("a red circle", frames=33, pacing="none") as live:
        assert frames_of(live.save(path).read_bytes()) == 33
    engine.fail_at = 2
    with client.realtime("a red circle", frames=81, pacing="none") as live, pytest.raises(VideoFailedError) as caught:
        live.save(tmp_path / "y.mp4")
    assert caught.value.code == "generation_failed"
    assert frames_of(part_of(tmp_path / "y.mp4").read_bytes()) == 21
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["x.mp4", "y.mp4.part"]


def test_a_full_server_is_an_error_that_says_when_to_ask_again(client: DiagonalClient, engine: FakeEngine) -> None:
    engine.allow(0)
    with client.realtime("x", frames=81), client.realtime("x", frames=81), pytest.raises(ServerFullError) as caught:
        client.realtime("x", frames=81)
    assert (caught.value.code, caught.value.retry_after_s) == ("server_full", 2.5)


def test_a_wrong_key_and_a_wrong_prompt_are_refusals(make_service: Callable[..., Service]) -> None:
    service = make_service(auth="keys")
    with DiagonalClient(service.urls[0], api_key="dk_no_no") as client, pytest.raises(RefusedError) as caught:
        client.realtime("x")
    assert caught.value.status == 401 and caught.value.code
    with DiagonalClient(make_service().urls[0]) as client, pytest.raises(RefusedError) as caught:
        client.realtime(" ")
    assert caught.value.code == "prompt_empty" and caught.value.param == "prompt"


@pytest.mark.slow
def test_nobody_there_is_no_answer() -> None:
    with DiagonalClient("http://127.0.0.1:9") as client, pytest.raises(NoAnswerError):
        client.realtime("x")


def test_the_stream_comes_in_whole_parts(client: DiagonalClient) -> None:
    video = client.create("a red circle", frames=33)
    parts = list(client.stream(video.id))
    assert len(parts) == 4 and frames_of(b"".join(parts)) == 33


def test_a_stream_whose_video_fails_says_so(client: DiagonalClient, engine: FakeEngine) -> None:
    engine.fail_at = 2
    with DiagonalClient(str(client._http.base_url), max_retries=2) as patient:
        video = patient.create("a red circle", frames=81)
        with pytest.raises(VideoFailedError):
            list(patient.stream(video.id))


@pytest.mark.slow
def test_a_video_is_paused_and_goes_on(client: DiagonalClient, engine: FakeEngine) -> None:
    engine.allow(1)
    video = client.create("a red circle", frames=33)
    client.pause(video.id)
    assert client.get(video.id).answer["paused"]
    client.resume(video.id)
    engine.allow(10)
    assert client.wait(video.id, timeout_s=20).frames_done == 33


def test_the_same_key_gives_the_same_video(client: DiagonalClient, engine: FakeEngine) -> None:
    one, two = (client.create("a red circle", frames=9, idempotency_key="k1") for _ in range(2))
    assert one.id == two.id


class CommandLine:
    """`diagonal watch` in its own process, with a pipe for what is typed."""

    def __init__(self, url: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "diagonal.cli", "watch", *arguments, "--url", url]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd="/")  # no demo is above

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def end(self) -> tuple[int, bytes, str]:
        try:
            output, errors = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        return self.process.returncode, output, errors.decode()


@pytest.mark.slow
def test_what_is_typed_while_a_session_is_watched_changes_its_prompt(
    service: Service, engine: FakeEngine, until: Until
) -> None:
    watching = CommandLine(service.urls[0], "a red circle", "--transition-chunks", "1")
    until(lambda: len(engine.made) >= 2, "two chunks")
    watching.type("a blue square")
    until(lambda: any(one.prompt == "a blue square" for one in engine.sessions.values()), "the new prompt")
    watching.type("/pause")
    until(lambda: any(one.paused for one in engine.sessions.values()), "paused")
    watching.type("/resume")
    until(lambda: len(engine.made) >= 7, "it goes on")
    watching.type("/stop")
    code, video, errors = watching.end()
    assert code == 0 and frames_of(video) >= 21 and "new prompt from frame" in errors


def test_an_interrupt_ends_the_session_and_the_file_is_whole(
    service: Service, engine: FakeEngine, until: Until, tmp_path: Path
) -> None:
    watching = CommandLine(service.urls[0], "a red circle", "--out", str(tmp_path / "x.mp4"))
    came = tmp_path / "x.mp4.part"
    until(lambda: came.exists() and came.stat().st_size > 0, "a chunk is written")
    watching.process.send_signal(signal.SIGINT)
    code, _, errors = watching.end()
    assert code == 0 and frames_of((tmp_path / "x.mp4").read_bytes()) >= 9, errors
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.mp4"]
    until(lambda: not engine.sessions, "the place is free", seconds=25)


def test_asyncio_does_the_same(service: Service) -> None:
    async def watch() -> tuple[list[int], int, str, int]:
        fields = start_fields("a red circle", frames=81, pacing="none", buffer_s=2.0)
        async with AsyncRealtime(service.urls[0], {}, fields) as live:
            indices, event = [], ""
            async for chunk in live:
                indices.append(chunk.index)
                if chunk.index == 1:
                    event = await live.change("a blue square")
                if chunk.index == 2:
                    live._socket.transport.abort()
            return indices, live.state.frames, live.changes[event].status, live.reconnects

    indices, frames, status, reconnects = asyncio.run(watch())
    assert indices == list(range(7)) and frames == 81 and status in ("started", "completed") and reconnects == 1
