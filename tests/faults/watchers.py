"""Viewers that watch a whole stream in a thread of their own: over HTTP, and over a socket with reconnects."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from typing import Any

import httpx2
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.serve.harness import http_client
from tests.serve.sockets import LOCAL_KEY, Viewer, viewer

PROMPT = "a red circle moving right slowly"
FPS = 16
_RECONNECT_S = 0.2
_PATIENCE_S = 180.0  # on a busy machine; what a test asserts about time it asserts itself


class Watcher:
    """Runs `_watch` in a thread; `video` is what came, `came_s` when each part of it did."""

    def __init__(self, url: str, seconds: float, seed: int) -> None:
        self.url, self.frames, self.seed = url, int(seconds * FPS), seed
        self.id, self.video, self.came_s = "", bytearray(), list[float]()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Any:
        self._thread.start()
        return self

    def reached(self, parts: int, deadline_s: float = _PATIENCE_S) -> None:
        """Wait until so many parts came."""
        end_s = time.monotonic() + deadline_s
        while len(self.came_s) < parts:
            assert self._thread.is_alive() and time.monotonic() < end_s, (len(self.came_s), self.error)
            time.sleep(0.02)

    def finish(self, deadline_s: float = _PATIENCE_S) -> Any:
        """Wait for the end, which must be a clean one."""
        self._thread.join(deadline_s)
        assert not self._thread.is_alive(), "it did not end"
        if self.error is not None:
            self.error.add_note(f"after {len(self.came_s)} parts of {self.id}: {self._state()}")
            raise self.error
        return self

    def _state(self) -> str:
        """What the service says of the video."""
        try:
            return httpx2.get(f"{self.url}/v1/videos/{self.id}", headers=LOCAL_KEY, timeout=10).text
        except httpx2.HTTPError as error:
            return repr(error)

    def longest_gap_s(self) -> float:
        """Between two parts."""
        return max(later - before for before, later in zip(self.came_s, self.came_s[1:], strict=False))

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:
            self.error = error

    def _watch(self) -> None:
        raise NotImplementedError


class OverHttp(Watcher):
    """`GET /v1/videos/{id}/stream` at the speed of playback; a response that is cut is an error."""

    def _watch(self) -> None:
        body = {"prompt": PROMPT, "num_frames": self.frames, "seed": self.seed, "extra": {"pacing": "realtime"}}
        with http_client(self.url, LOCAL_KEY) as http:
            self.id = http.post("/v1/videos", json=body).raise_for_status().json()["id"]
            with http.stream("GET", f"/v1/videos/{self.id}/stream") as answer:
                for part in answer.iter_raw():
                    self.video += part
                    self.came_s.append(time.monotonic())


class OverSocket(Watcher):
    """`WS /v1/realtime/video`, going on with the newest token when a connection ends; `closes` says how they did."""

    def __init__(self, url: str, seconds: float, seed: int) -> None:
        super().__init__(url, seconds, seed)
        self.closes: list[int] = []
        self.drained = 0
        self.indices: list[int] = []
        self._done, self._token = False, ""

    def _watch(self) -> None:
        end_s = time.monotonic() + _PATIENCE_S
        while not self._done:
            assert time.monotonic() < end_s, f"no connection goes on: {self.closes}"
            try:
                with viewer(self.url, deadline_s=_PATIENCE_S) as one:
                    self._read(one)
                    end_s = time.monotonic() + _PATIENCE_S
            except (ConnectionClosed, InvalidStatus, OSError, EOFError) as error:
                received = error.rcvd if isinstance(error, ConnectionClosed) else None
                self.closes.append(received.code if received is not None else 1006)
                time.sleep(_RECONNECT_S)

    def _read(self, one: Viewer) -> None:
        begin: dict[str, Any] = {"prompt": PROMPT, "num_frames": self.frames, "seed": self.seed}
        one.start(**({"resume_token": self._token} if self._token else begin))
        self.id, self._token = one.request_id, one.resume_token
        while not self._done:
            before = len(one.video)
            message = one.next()
            self._token = message.get("resume_token", self._token)
            if message["type"] == "video.chunk_metadata":
                self.video += one.video[before:]
                self.indices.append(message["generation_chunk_index"])
                self.came_s.append(time.monotonic())
            self.drained += message["type"] == "session.draining"
            self._done = message["type"] == "session.done"


def assert_whole(watcher: Watcher, ffprobe: str) -> None:
    """Every frame is there once, at its time: by ffprobe."""
    command = [ffprobe, "-v", "error", "-show_entries", "frame=pts_time", "-of", "csv=p=0"]
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(watcher.video)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr.strip(), done.stderr
    times = [float(line.strip(",")) for line in done.stdout.split()]
    assert len(times) == watcher.frames, (len(times), watcher.frames, vars(watcher) | {"video": len(watcher.video)})
    assert all(abs(at - number / FPS) < 0.002 for number, at in enumerate(times))
