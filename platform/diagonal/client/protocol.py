"""What is said on `WS /v1/realtime/video`, without a socket: one live session's state, and the proof of every chunk.

Chunks are numbered, and the state takes each one once, in order, with the bytes that its hash names and the place on
the timeline that follows from the one before. A connection may break at any message: `opening` then asks to go on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

from diagonal import mp4
from diagonal.client.errors import BrokenStreamError, DiagonalError, VideoFailedError, error_for

TAKEN_OVER, FAILED, FULL = 4001, 1011, 1013
_STATUS_OF_CLOSE = {FULL: 429, FAILED: 500, 1008: 400, 1009: 413, 1003: 415, TAKEN_OVER: 409}
_BREAKS = (1000, 1001, 1005, 1006, 1011, 1012, 1014)  # closes that say nothing of the session: it goes on elsewhere
_PASSING = ("unavailable", "draining", "session_draining")  # errors of a server that is not there for a moment
Pacing = Literal["none", "realtime"]
ChangeStatus = Literal["sent", "queued", "started", "completed", "refused"]


class Wish(TypedDict, total=False):
    """What may be said of a video beside its prompt; what is not given is the server's default."""

    model: str | None
    frames: int | None
    seconds: float | None
    seed: int | None
    size: str | None
    endless: bool


@dataclass(frozen=True)
class Chunk:
    """One chunk as it came: `data` joins to an MP4, the first one begins with the initialisation segment."""

    index: int
    frames: int
    first_frame: int
    data: bytes
    started_events: tuple[str, ...]
    active_events: tuple[str, ...]
    completed_events: tuple[str, ...]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Opening:
    """What the server said of the session when it began; `frames` is None for a stream without an end."""

    request_id: str
    mime: str
    fps: int
    width: int
    height: int
    frames: int | None
    seed: int
    answer: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A prompt change, or a pause, or its end; `chunk` is the first one that it shows in."""

    event_id: str
    message: str
    status: ChangeStatus = "sent"
    chunk: int | None = None
    error: DiagonalError | None = None


class StreamState:
    """One live session; `fields` are those of `session.start`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)
        self._announced: Mapping[str, Any] | None = None
        self._error: Mapping[str, Any] | None = None
        self._timescale = 0
        self.token = ""
        self.next_chunk = self.frames = 0
        self.position_s = 0.0
        self.opening_answer: Opening | None = None
        self.changes: dict[str, Change] = {}
        self.done = self.stopped = self.stopping = self.draining = self.answered = False

    @property
    def window_s(self) -> float | None:
        """The media that the viewer wants ahead of him, where he tells his position."""
        window_s = self._fields.get("streaming_buffer_seconds")
        return None if window_s is None else float(window_s)

    @property
    def fps(self) -> int:
        return self.opening_answer.fps if self.opening_answer else 0

    @property
    def media_s(self) -> float:
        """Seconds of media that came."""
        return self.frames / self.fps if self.fps else 0.0

    def opening(self) -> str:
        """`session.start`: the request, or with the newest token that of the next chunk."""
        self._announced = self._error = None
        self.draining = self.answered = False
        fields = {"resume_token": self.token, "streaming_buffer_seconds": self.window_s} if self.token else self._fields
        return _message("session.start", _given(fields))

    def reminders(self) -> list[str]:
        """What to say again once a new connection goes on: it may be lost, and is no harm twice."""
        again = [change.message for change in self.changes.values() if change.status == "sent"]
        if self.window_s is not None:
            again.append(self.position(self.position_s))
        return [*again, self.stop()] if self.stopping else again

    def change(self, event: Mapping[str, Any], transition_chunks: int = 0, event_id: str | None = None) -> Change:
        """`session.interaction`: {"prompt": ...}, or {"action": "pause"} or "resume"."""
        event_id = event_id or os.urandom(8).hex()
        interaction = {"event_id": event_id, "event": dict(event), "transition_chunks": transition_chunks}
        change = Change(event_id, _message("session.interaction", {"interaction": interaction}))
        return self.changes.setdefault(event_id, change)

    def position(self, seconds: float) -> str:
        """`session.playback`: how far the viewer has played."""
        self.position_s = max(self.position_s, seconds)
        return _message("session.playback", {"position_seconds": self.position_s})

    def ping(self) -> str:
        return _message("session.ping", {})

    def stop(self) -> str:
        """`session.stop`: the stream ends where it is."""
        self.stopping = True
        return _message("session.stop", {})

    def receive(self, message: str | bytes) -> Chunk | None:
        """Take a message; a chunk where it completes one. `BrokenStreamError` when it is not the right one."""
        if isinstance(message, bytes):
            return self._take(message)
        told = json.loads(message)
        kind = told.get("type")
        if kind == "video.chunk_metadata":
            self._announced = told
        elif kind == "video.start":
            self._open(told)
        elif kind == "session.interaction.queued":
            self._note(told["event_id"], status="queued")
        elif kind == "error":
            self._fail(told)
        elif kind == "session.draining":
            self.draining = True
        elif kind == "session.done":
            self._end(told)
        return None

    def closed(self, code: int) -> None:
        """The connection ended; the error that says why, unless another connection can go on with the session."""
        if self.done:
            return
        error = self._error
        if self.token and (self.draining or (error["code"] in _PASSING if error else code in _BREAKS)):
            return
        raise _error_of(error, code)

    def _open(self, told: Mapping[str, Any]) -> None:
        config = told["config"]
        self.token, self.answered = told.get("resume_token", ""), True
        if self.opening_answer is None:
            self.opening_answer = Opening(
                told["request_id"],
                told["mime"],
                config["fps"],
                config["width"],
                config["height"],
                config.get("num_frames"),
                config["seed"],
                told,
            )
        if told.get("next_chunk", self.next_chunk) != self.next_chunk:
            raise _broken(
                "resume_mismatch", f"the stream goes on with chunk {told['next_chunk']}, wanted is {self.next_chunk}"
            )

    def _take(self, data: bytes) -> Chunk:
        about, self._announced, self._error = self._announced, None, None
        if about is None:
            raise _broken("unexpected_frame", "a binary frame came without its metadata")
        index, frames = about["generation_chunk_index"], about["num_frames"]
        if index != self.next_chunk:
            kind = "chunk_missing" if index > self.next_chunk else "chunk_repeated"
            raise _broken(kind, f"chunk {index} came, wanted is {self.next_chunk}")
        self._verify(about, data, frames)
        events = {name: tuple(about.get(f"{name}_event_ids", ())) for name in ("started", "active", "completed")}
        for event_id in events["started"]:
            self._note(event_id, status="started", chunk=index)
        for event_id in events["completed"]:
            self._note(event_id, status="completed")
        chunk = Chunk(index, frames, self.frames, data, events["started"], events["active"], events["completed"], about)
        self.token = about.get("resume_token", self.token)
        self.next_chunk, self.frames = index + 1, self.frames + frames
        return chunk

    def _verify(self, about: Mapping[str, Any], data: bytes, frames: int) -> None:
        """The bytes are those of the metadata, and stand where the chunks before them end."""
        init, media = mp4.split(data)
        if init:
            self._timescale = mp4.timescale(init)
        name, sha256 = about["generation_chunk_index"], about.get("chunk_sha256")
        if len(data) != about["byte_length"] or sha256 not in (None, hashlib.sha256(media).hexdigest()):
            raise _broken("wrong_hash", f"chunk {name} is not what its metadata says")
        fragment = mp4.read_fragment(media)
        if fragment.frames != frames or fragment.start_ticks * self.fps != self.frames * self._timescale:
            raise _broken(
                "wrong_place",
                f"chunk {name} has {fragment.frames} frames from tick "
                f"{fragment.start_ticks}, announced are {frames} after {self.frames}",
            )

    def _note(self, event_id: str, **news: Any) -> None:
        if event_id in self.changes:
            self.changes[event_id] = replace(self.changes[event_id], **news)

    def _fail(self, told: Mapping[str, Any]) -> None:
        """Of one event the stream goes on; any other error is told when the connection ends."""
        if "event_id" in told:
            self._note(told["event_id"], status="refused", error=_error_of(told, 1008))
        else:
            self._error = told

    def _end(self, told: Mapping[str, Any]) -> None:
        self.done, self.stopped = True, bool(told.get("stopped"))
        frames = self.opening_answer.frames if self.opening_answer else None
        if not self.stopped and frames is not None and frames != self.frames:
            raise _broken("chunk_missing", f"the stream ended after {self.frames} of {frames} frames")


def start_fields(
    prompt: str, *, pacing: Pacing | None = None, buffer_s: float | None = None, **wish: Unpack[Wish]
) -> dict[str, Any]:
    """Fields of a request or of `session.start`; a name that is none is sent as it is, for the server to refuse."""
    asked: dict[str, Any] = {**wish}
    extra = {"pacing": pacing, "endless": asked.pop("endless", False) or None}
    frames = asked.pop("frames", None)
    return _given(
        {
            "prompt": prompt,
            "num_frames": frames,
            "streaming_buffer_seconds": buffer_s,
            "extra": _given(extra) or None,
            **asked,
        }
    )


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _message(kind: str, fields: Mapping[str, Any]) -> str:
    return json.dumps({"type": kind, **fields})


def _broken(code: str, message: str) -> BrokenStreamError:
    return BrokenStreamError(message, status=200, code=code)


def _error_of(told: Mapping[str, Any] | None, close_code: int) -> DiagonalError:
    """The error that the server told, or that its close code stands for."""
    if told is None:
        name = "session_taken_over" if close_code == TAKEN_OVER else "connection_closed"
        told = {"message": f"the connection was closed with {close_code}", "code": name}
        status = _STATUS_OF_CLOSE.get(close_code, 0)
    else:
        status = 503 if told["code"] in _PASSING else _STATUS_OF_CLOSE.get(close_code, 400)
    about = {
        "code": told["code"],
        "param": told.get("param"),
        "retry_after_s": told.get("retry_after_seconds"),
        "request_id": told.get("request_id", ""),
    }
    if status == 500 and "request_id" in told:
        return VideoFailedError(str(told["message"]), status=200, **about)
    return error_for(str(told["message"]), status, **about)
