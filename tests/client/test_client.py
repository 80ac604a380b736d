"""The client and its command line against a server of a few lines, inside the test."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from diagonal.cli import FAILED, FULL, NO_ANSWER, REFUSED, main
from diagonal.client import DiagonalClient, DiagonalError
from diagonal.client.client import local_key
from diagonal.client.commands import Progress

FILE = b"....ftyp the file"


def box(name: bytes, body: bytes = b"") -> bytes:
    return (8 + len(body)).to_bytes(4, "big") + name + body


def fragment(body: bytes) -> bytes:
    """The boxes of a chunk of one frame that the command line reads its count from."""
    track = box(b"tfhd", bytes(8)) + box(b"tfdt", bytes(8)) + box(b"trun", bytes(4) + (1).to_bytes(4, "big"))
    return box(b"moof", box(b"mfhd", bytes(8)) + box(b"traf", track)) + box(b"mdat", body)


PARTS = [box(b"ftyp") + box(b"moov"), *(fragment(body) for body in (b"one", b"two"))]


def problem(status: int, code: str, message: str, **headers: str) -> httpx2.Response:
    error = {"message": message, "type": "invalid_request_error", "param": "prompt", "code": code}
    return httpx2.Response(status, json={"title": code, "error": error}, headers=headers)


class Server:
    """Two polls to a finished video; remembers every request."""

    def __init__(self, outcome: str = "completed") -> None:
        self.outcome, self.polls = outcome, 0
        self.requests: list[tuple[str, str, dict]] = []
        self.headers: list[httpx2.Headers] = []
        self.params: list[httpx2.QueryParams] = []
        self.answers: dict[str, httpx2.Response] = {}
        self.first_answers: list[httpx2.Response] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content) if request.content else {}
        self.requests.append((request.method, request.url.path, body))
        self.headers.append(request.headers)
        self.params.append(request.url.params)
        if self.first_answers:
            return self.first_answers.pop(0)
        if request.method in self.answers:
            return self.answers[request.method]
        if request.url.path.endswith("/content"):
            return httpx2.Response(200, content=FILE)
        if request.url.path.endswith("/stream"):
            return httpx2.Response(200, content=iter(PARTS))
        if request.url.path.endswith("/interactions"):
            return httpx2.Response(202, json={"event_id": body["interaction"]["event_id"]})
        self.polls += request.method == "GET"
        return httpx2.Response(200, json=self.video("in_progress" if self.polls < 2 else self.outcome))

    def video(self, status: str) -> dict:
        error = {"code": "engine_failed", "message": "it broke"} if status == "failed" else None
        shape = {"num_frames": 81, "frames_done": 9, "fps": 16, "size": "256x256", "mime": "video/mp4"}
        return {"id": "video_1", "status": status, "progress": 11, "error": error} | shape

    def client(self, url: str | None = None, **options: Any) -> DiagonalClient:
        return DiagonalClient(url or "http://server", transport=httpx2.MockTransport(self), **options)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def run(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr("time.sleep", lambda _: None)
    return lambda *arguments: main([str(argument) for argument in arguments], client=server.client)


def test_a_server_on_this_machine_alone_is_shown_the_key_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".diagonal" / "serve").mkdir(parents=True)
    (tmp_path / ".diagonal" / "serve" / "local_key").write_text("dk_local_1\n")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.delenv("DIAGONAL_API_KEY", raising=False)
    urls = (
        "http://127.0.0.1:8000",
        "http://localhost:1",
        "http://[::1]:1",
        "https://127.0.0.1.evil.example",
        "http://a.b",
    )
    assert [local_key(url) for url in urls] == ["dk_local_1"] * 3 + [None] * 2
    shown: list[str | None] = []

    def server(request: httpx2.Request) -> httpx2.Response:
        shown.append(request.headers.get("authorization"))
        return httpx2.Response(200, json={"data": []})

    for url, key in ((urls[0], None), (urls[0], "dk_1_2"), (urls[4], None)):
        with DiagonalClient(url, api_key=key, transport=httpx2.MockTransport(server)) as client:
            client._http.get("/v1/models")
    assert shown == ["Bearer dk_local_1", "Bearer dk_1_2", None]


def test_only_what_was_given_is_sent(server: Server) -> None:
    with server.client() as client:
        client.create("a red circle", frames=9, seed=3, pacing="realtime")
    expected = {"prompt": "a red circle", "num_frames": 9, "seed": 3, "extra": {"pacing": "realtime"}}
    assert server.requests == [("POST", "/v1/videos", expected)]


def test_the_stream_comes_in_parts(server: Server) -> None:
    with server.client() as client:
        assert list(client.stream("video_1")) == PARTS


def test_a_stream_that_breaks_goes_on_with_the_next_chunk(server: Server, waits: list[float]) -> None:
    def broken() -> Iterator[bytes]:
        yield PARTS[0] + PARTS[1] + PARTS[2][:5]
        raise httpx2.ReadError("gone")

    server.first_answers = [
        httpx2.Response(200, content=broken()),
        httpx2.Response(200, json=server.video("in_progress")),
        httpx2.Response(200, content=iter([PARTS[0], PARTS[2]])),
    ]
    with server.client() as client:
        assert list(client.stream("video_1")) == PARTS
    assert [params.get("start_chunk") for params in server.params] == ["0", None, "1"]


def test_an_interaction_names_its_event(server: Server) -> None:
    with server.client() as client:
        assert client.interact("video_1", "a blue square", event_id="e1", transition_chunks=2) == "e1"
    interaction = {"event_id": "e1", "event": {"prompt": "a blue square"}, "transition_chunks": 2}
    assert server.requests[-1][2] == {"interaction": interaction}


def test_an_error_answer_carries_what_the_server_said(server: Server) -> None:
    server.answers["POST"] = problem(429, "server_full", "no room", **{"Retry-After": "3"})
    with server.client(max_retries=0) as client, pytest.raises(DiagonalError, match="no room") as caught:
        client.create("a red circle")
    error = caught.value
    assert (error.status, error.code, error.param, error.retry_after_s) == (429, "server_full", "prompt", 3.0)


def test_an_error_answer_that_is_not_json_is_still_told(server: Server) -> None:
    server.answers["GET"] = httpx2.Response(502, text="bad gateway")
    with server.client(max_retries=0) as client, pytest.raises(DiagonalError, match="502"):
        client.get("video_1")
    with server.client() as client, pytest.raises(DiagonalError, match="502"):
        list(client.stream("video_1"))


def test_a_video_that_failed_ends_the_wait(server: Server) -> None:
    server.outcome = "failed"
    with server.client() as client, pytest.raises(DiagonalError, match="it broke"):
        client.wait("video_1", poll_s=0)


def test_generate_saves_the_file(run: Callable[..., int], server: Server, tmp_path: Path) -> None:
    assert run("generate", "a red circle", "--frames", 81, "--out", tmp_path / "x.mp4") == 0
    assert (tmp_path / "x.mp4").read_bytes() == FILE
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_stream_writes_the_bytes_to_a_file(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("stream", "a red circle", "--out", tmp_path / "x.mp4") == 0
    assert (tmp_path / "x.mp4").read_bytes() == b"".join(PARTS)


def test_steer_changes_the_prompt(run: Callable[..., int], server: Server) -> None:
    assert run("steer", "video_1", "a blue square") == 0
    assert server.requests[-1][2]["interaction"]["event"] == {"prompt": "a blue square"}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (problem(422, "prompt_empty", "prompt = '': ..."), REFUSED),
        (problem(429, "server_full", "no room"), FULL),
        (problem(500, "internal", "sorry"), NO_ANSWER),
    ],
)
def test_each_kind_of_refusal_has_its_exit_code(
    run: Callable[..., int], server: Server, capsys: pytest.CaptureFixture[str], answer: httpx2.Response, code: int
) -> None:
    server.answers["POST"] = answer
    assert run("generate", "a red circle") == code
    assert capsys.readouterr().err == f"diagonal: {answer.json()['error']['message']}\n"


def test_a_failed_video_leaves_no_file(run: Callable[..., int], server: Server, tmp_path: Path) -> None:
    server.outcome = "failed"
    assert run("generate", "a red circle", "--out", tmp_path / "x.mp4") == FAILED
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused_before_any_work(run: Callable[..., int], server: Server, tmp_path: Path) -> None:
    assert run("generate", "a red circle", "--out", tmp_path / "none" / "x.mp4") == REFUSED
    assert server.requests == []


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client slept, without sleeping; other threads of this process sleep as ever."""
    waits: list[float] = []
    monkeypatch.setattr("diagonal.client.client.time", SimpleNamespace(**{**vars(time), "sleep": waits.append}))
    return waits


def test_a_full_server_is_asked_again_after_the_time_that_it_names(server: Server, waits: list[float]) -> None:
    server.first_answers = [problem(429, "server_full", "no room", **{"Retry-After": "3"}) for _ in range(2)]
    with server.client() as client:
        assert client.create("a red circle").id == "video_1"
    assert [round(wait) for wait in waits] == [3, 3]
    names = {headers["idempotency-key"] for headers in server.headers}
    assert len(server.requests) == 3 and len(names) == 1  # however often it is asked, it is one video


def test_a_connection_that_breaks_is_tried_again_and_then_told(waits: list[float]) -> None:
    with DiagonalClient("http://127.0.0.1:9", max_retries=2) as client, pytest.raises(DiagonalError) as caught:
        client.get("video_1")
    assert caught.value.code == "no_answer" and len(waits) == 2 and waits[1] > waits[0] / 2


@pytest.mark.parametrize(("status", "wait"), [(400, ""), (401, ""), (409, "1"), (429, "3600"), (500, "")])
def test_what_asking_again_does_not_mend_is_asked_once(
    server: Server, waits: list[float], status: int, wait: str
) -> None:
    server.answers["POST"] = problem(status, "no", "no", **({"Retry-After": wait} if wait else {}))
    with server.client() as client, pytest.raises(DiagonalError):
        client.create("a red circle")
    assert len(server.requests) == 1 and waits == []


def test_key_and_address_come_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGONAL_API_KEY", "dk_1_2")
    monkeypatch.setenv("DIAGONAL_URL", "http://from-environment")
    with DiagonalClient(transport=httpx2.MockTransport(server)) as client:
        client.get("video_1")
    assert server.headers[0]["authorization"] == "Bearer dk_1_2"
    assert server.headers[0]["host"] == "from-environment"
    with server.client(api_key="dk_3_4") as client:
        client.get("video_1")
    assert server.headers[1]["authorization"] == "Bearer dk_3_4"


def test_a_video_that_is_made_already_is_streamed_by_its_id(
    run: Callable[..., int], server: Server, tmp_path: Path
) -> None:
    assert run("stream", "--video", "video_1", "--out", tmp_path / "x.mp4") == 0
    assert [method for method, _, _ in server.requests] == ["GET", "GET"]


def test_what_came_of_a_broken_stream_is_kept_beside_its_name(
    run: Callable[..., int], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[bytes]:
        yield PARTS[0] + PARTS[1]
        server.answers["GET"] = httpx2.Response(200, json=server.video("failed"))
        raise httpx2.ReadError("gone")

    server.first_answers = [
        httpx2.Response(200, json=server.video("in_progress")),
        httpx2.Response(200, content=broken()),
    ]
    assert run("stream", "a red circle", "--out", tmp_path / "x.mp4") == FAILED
    assert (tmp_path / "x.mp4.part").read_bytes() == PARTS[0] + PARTS[1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4.part"]
    assert "x.mp4.part" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["pause", "resume"])
def test_a_video_is_paused_and_goes_on(run: Callable[..., int], server: Server, action: str) -> None:
    assert run(action, "video_1") == 0
    assert server.requests[-1][2]["interaction"]["event"] == {"action": action}


def test_a_key_that_is_given_counts_more_than_that_of_the_environment(
    run: Callable[..., int], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGONAL_API_KEY", "dk_1_2")
    assert run("pause", "video_1", "--key", "dk_3_4") == 0
    assert server.headers[-1]["authorization"] == "Bearer dk_3_4"


def test_progress_tells_chunk_rate_and_time_left() -> None:
    line = Progress(81).line(27, 3, 1.5)
    assert line == "[##########....................] 27/81 frames, chunk 3, 18.0 fps, 3 s left"
    assert Progress(None).line(27, 3, 1.5) == "27 frames, chunk 3, 18.0 fps"


@pytest.mark.slow
def test_no_server_is_an_exit_code_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red circle", "--url", "http://127.0.0.1:9"]) == NO_ANSWER
    assert capsys.readouterr().err.count("\n") == 1


def test_the_client_imports_neither_torch_nor_ray() -> None:
    code = "import sys, diagonal.client.commands; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="platform")
    assert done.stdout.strip() == "[]", done.stderr


class CutFile:
    """A server of one file, whose first answers end after so many bytes; keeps the ranges that it was asked for."""

    data = bytes(range(256)) * 40

    def __init__(self, cuts: int, tag: str = '"v1"') -> None:
        self.cuts, self.tag, self.ranges = cuts, tag, list[str | None]()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        asked = request.headers.get("range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and request.headers.get("if-range") != self.tag:
            start, asked = 0, None
        rest, self.cuts = self.data[start:], self.cuts - 1
        status = 206 if asked else 200
        return httpx2.Response(status, headers={"etag": self.tag}, stream=_Cut(rest, self.cuts >= 0))


class _Cut(httpx2.SyncByteStream):
    def __init__(self, data: bytes, ends_early: bool) -> None:
        self._data, self._ends_early = data, ends_early

    def __iter__(self) -> Iterator[bytes]:
        if self._ends_early:
            yield self._data[:3000]
            raise httpx2.RemoteProtocolError("peer closed connection")
        yield self._data


def test_a_file_whose_download_breaks_continues_behind_what_came(tmp_path: Path) -> None:
    server = CutFile(2)
    with DiagonalClient("http://server", transport=httpx2.MockTransport(server)) as client:
        assert client.save("video_1", tmp_path / "x.mp4").read_bytes() == CutFile.data
    assert server.ranges == [None, "bytes=3000-", "bytes=6000-"]


def test_a_file_that_changed_meanwhile_is_never_a_mixture(tmp_path: Path) -> None:
    server = CutFile(1)

    def changes(request: httpx2.Request) -> httpx2.Response:
        answer = server(request)
        server.tag = '"v2"'
        return answer

    with DiagonalClient("http://server", transport=httpx2.MockTransport(changes)) as client:
        with pytest.raises(DiagonalError, match="the file changed while it was read"):
            client.save("video_1", tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_connection_names_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with DiagonalClient(address, max_retries=0) as client, pytest.raises(DiagonalError, match=f"at {address}/"):
        client.models()
