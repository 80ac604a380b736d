"""A viewer on `WS /v1/realtime/video`, over a real socket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

DEADLINE_S = 60.0  # of a busy machine: nothing that is asserted depends on it
LOCAL_TOKEN = "dk_local_of-the-tests"
LOCAL_KEY = {"Authorization": f"Bearer {LOCAL_TOKEN}"}


def give_local_key(data: Path) -> None:
    """Put the key of the tests where a service with `auth: local` keeps its own."""
    data.mkdir(parents=True, exist_ok=True)
    (data / "local_key").write_text(LOCAL_TOKEN)
    (data / "local_key").chmod(0o600)


class Viewer:
    """One connection. Checks of every chunk that its frame follows its metadata, whole."""

    def __init__(self, socket: ClientConnection, deadline_s: float = DEADLINE_S) -> None:
        self.socket, self.deadline_s = socket, deadline_s
        self.video = bytearray()
        self.chunks: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.request_id, self.resume_token = "", ""

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def start(self, **fields: Any) -> dict[str, Any]:
        """Begin, or go on; gives `video.start`."""
        self.say("session.start", **({"prompt": "a red circle"} | fields))
        started = self.next()
        assert started["type"] == "video.start", started
        self.request_id, self.resume_token = started["request_id"], started["resume_token"]
        return started

    def next(self) -> dict[str, Any]:
        """The next message; a chunk's frame is taken with it."""
        message: dict[str, Any] = json.loads(self.socket.recv(self.deadline_s))
        if message["type"] != "video.chunk_metadata":
            self.others.append(message)
            return message
        data = self.socket.recv(self.deadline_s)
        assert isinstance(data, bytes) and len(data) == message["byte_length"]
        media = data[data.index(b"moof") - 4 :]
        assert hashlib.sha256(media).hexdigest() == message["chunk_sha256"]
        self.video += data
        self.chunks.append(message)
        self.resume_token = message["resume_token"]
        return message

    def until(self, kind: str) -> dict[str, Any]:
        """Read on to the next message of that kind."""
        while (message := self.next())["type"] != kind:
            pass
        return message

    def read(self, chunks: int) -> None:
        """Read so many more chunks."""
        wanted = len(self.chunks) + chunks
        while len(self.chunks) < wanted:
            self.next()

    @property
    def indices(self) -> list[int]:
        return [chunk["generation_chunk_index"] for chunk in self.chunks]


@contextmanager
def viewer(
    url: str, headers: Mapping[str, str] | None = None, deadline_s: float = DEADLINE_S, **options: Any
) -> Iterator[Viewer]:
    """A connection to a service by its HTTP address, with the local key if no other is shown; closed at the end."""
    if headers is None and "subprotocols" not in options:
        headers = LOCAL_KEY
    address = f"{url.replace('http', 'ws', 1)}/v1/realtime/video"
    with connect(address, additional_headers=headers, open_timeout=10, max_size=1 << 24, **options) as socket:
        yield Viewer(socket, deadline_s)


def cut(one: Viewer) -> None:
    """Break the connection without a word, as a lost network does."""
    one.socket.socket.shutdown(2)


def stop_and_close(one: Viewer) -> None:
    """Say `session.stop` and close in one packet, as a page does that is left at once."""
    protocol = one.socket.protocol
    with one.socket.protocol_mutex:
        protocol.send_text(b'{"type": "session.stop"}')
        protocol.send_close(1000)
        one.socket.socket.sendall(b"".join(protocol.data_to_send()))


def closed(one: Viewer) -> tuple[int, dict[str, Any]]:
    """Read to the end of a socket: its close code (1006 when it just broke), and the error that came before it."""
    with pytest.raises(ConnectionClosed) as end:
        while True:
            one.next()
    errors = [message for message in one.others if message["type"] == "error"]
    received = end.value.rcvd
    return (received.code if received else 1006), (errors[-1] if errors else {})
