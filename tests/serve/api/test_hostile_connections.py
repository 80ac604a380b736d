"""Threats 6 and 8, faults S2 and S3: connections that do nothing, that read nothing, and that are simply gone.

Crowds of them are in tests/faults/test_crowds.py.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx2
import pytest
from websockets.exceptions import InvalidStatus

from serve.api.realtime import RealtimeLimits
from serve.replica import replica
from tests.serve.harness import FakeEngine, Service, Until, http_client
from tests.serve.hostile import new_key, open_files, start, told
from tests.serve.sockets import closed, viewer
from tests.serve.wire import wire

CHUNK_BYTES = 400_000


@pytest.fixture
def guarded(make_service: Callable[..., Service]) -> Service:
    return make_service(auth="keys")


@pytest.fixture
def http(guarded: Service) -> Iterator[httpx2.Client]:
    with http_client(guarded.urls[0]) as client:
        yield client


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as large as those of a large picture: what MP4 calls free space is added to each."""
    encode, space = replica._encode_chunk, struct.pack(">I4s", CHUNK_BYTES, b"free") + os.urandom(CHUNK_BYTES - 8)
    monkeypatch.setattr(replica, "_encode_chunk", lambda *arguments: encode(*arguments) + space)


def connection(service: Service, sent: bytes) -> socket.socket:
    there = urlsplit(service.urls[0])
    assert there.hostname and there.port
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # it takes little before it is read
    one.settimeout(10)
    one.connect((there.hostname, there.port))
    one.sendall(sent)
    return one


def test_6_who_does_not_say_it_all_in_time_is_sent_away(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.api.body._TIMEOUT_S", 0.3)
    service = make_service(auth="keys", limits=RealtimeLimits(start_timeout_s=0.3))
    headers = new_key(service)
    lines = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['Authorization']}\r\n"
    with connection(service, f"{lines}Content-Length: 60\r\n\r\n{{".encode()) as slow:
        slow.settimeout(5)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    with viewer(service.urls[0], headers) as one:
        assert closed(one)[1]["code"] == "start_timeout"


def test_6_one_key_cannot_take_all_connections_of_a_gateway(
    guarded: Service, http: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr("serve.api.auth.REQUESTS_AT_ONCE", 4)
    engine.allow(0)
    greedy, modest = new_key(guarded), new_key(guarded)
    video = start(http, greedy)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(viewer(guarded.urls[0], greedy))
        for _ in range(2):
            stack.enter_context(http.stream("GET", f"/v1/videos/{video}/stream", headers=greedy))
        answer = http.get("/v1/models", headers=greedy)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_requests")
        assert int(answer.headers["retry-after"]) >= 1
        with pytest.raises(InvalidStatus) as refused, viewer(guarded.urls[0], greedy):
            pass
        assert refused.value.response.status_code == 429
        assert http.get("/v1/models", headers=modest).status_code == 200
    until(lambda: http.get("/v1/models", headers=greedy).status_code == 200, "its connections are gone")


@pytest.mark.slow
def test_s2_a_plain_reader_that_stops_reading_stops_its_generation_and_loses_its_slot(
    make_service: Callable[..., Service], engine: FakeEngine, heavy: None, until: Until
) -> None:
    service = make_service(store={"reader_silence_s": 1.0, "sweep_s": 0.2})
    with http_client(service.urls[0]) as http:
        video = start(http, pacing="realtime", num_frames=900)
        asked = f"GET /v1/videos/{video}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with connection(service, asked) as stuck:
            assert stuck.recv(1000)
            until(lambda: told(http, video)["status"] == "cancelled", "given up")
            assert told(http, video)["error"]["code"] == "abandoned"
            assert told(http, video)["chunks_done"] < 40, "what the network's buffers take"
        until(lambda: not engine.sessions, "the place is free", seconds=25)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize("way", ["get", "socket"])
def test_s3_a_connection_that_ends_or_breaks_stops_generation_within_a_chunk(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until, way: str, end: str
) -> None:
    service = make_service(resume_window_s=0.5)
    with http_client(service.urls[0]) as http, ExitStack() as stack:
        if way == "get":
            video = start(http, pacing="realtime", num_frames=900)
            raw = connection(service, f"GET /v1/videos/{video}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            while b"mdat" not in raw.recv(1 << 16):
                pass
        else:
            one = stack.enter_context(viewer(service.urls[0]))
            one.start(num_frames=900)
            one.read(1)
            raw = one.socket.socket
        if end == "rst":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made = len(engine.made)
        raw.shutdown(socket.SHUT_RDWR) if end == "fin" else raw.close()
        until(lambda: not engine.sessions, "the place is free", seconds=25)
        assert len(engine.made) <= made + 2, "the one in the making, and the one that was already allowed"
        raw.close()


@pytest.mark.slow
def test_s3_a_pulled_cable_stops_generation_at_the_credits_and_frees_the_slot(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service(limits=RealtimeLimits(stall_timeout_s=2.0), resume_window_s=0.5)
    with wire(service.urls[0]) as cable, viewer(cable.url, close_timeout=0.5) as one:
        one.start(num_frames=900, streaming_buffer_seconds=1.0)
        one.read(2)
        one.say("session.playback", position_seconds=0.6)
        one.read(1)
        cable.dead = True
        made = len(engine.made)
        one.say("session.playback", position_seconds=100.0)  # does not get there
        time.sleep(1.0)
        assert len(engine.made) <= made + 1
        until(lambda: not engine.sessions, "the slot is free", seconds=25)
        assert len(engine.made) <= made + 1


def test_8_sessions_beyond_the_last_slot_are_refused_and_hold_nothing(
    make_service: Callable[..., Service], engine: FakeEngine, until: Until
) -> None:
    service = make_service()
    engine.allow(0)
    with http_client(service.urls[0]) as http:
        files = open_files()
        answers = [http.post("/v1/videos", json={"prompt": "x", "num_frames": 21}) for _ in range(12)]
        assert [answer.status_code for answer in answers] == [200] * 2 + [429] * 10
        assert {answer.headers["retry-after"] for answer in answers[2:]} == {"3"}
        assert {answer.json()["error"]["code"] for answer in answers[2:]} == {"server_full"}
        assert len(http.get("/v1/videos").json()["data"]) == 2, "a refused one leaves nothing"
        assert engine.stats().cache_bytes > 0
        for answer in answers[:2]:
            http.delete(f"/v1/videos/{answer.json()['id']}")
        until(lambda: engine.stats().cache_bytes == 0, "every byte is back")
        assert open_files() <= files + 4


@pytest.mark.slow
def test_4_an_encoder_keeps_nothing_of_the_stream_before(make_service: Callable[..., Service], until: Until) -> None:
    """The same picture behind another session's is the same bytes as in a service that made nothing else."""

    def stream(service: Service, *prompts: str) -> bytes:
        with http_client(service.urls[0]) as http:
            for prompt in prompts:
                found = http.get(f"/v1/videos/{start(http, prompt=prompt, num_frames=45)}/stream").content
                until(lambda: not service.engine.sessions, "the place is free", seconds=25)
        return found

    assert stream(make_service(), "a red circle", "a blue square") == stream(make_service(), "a blue square")
