"""Messages of `WS /v1/realtime/video`: vLLM-Omni's streaming dialect, with optional fields of ours.

JSON text frames both ways; each `video.chunk_metadata` is followed at once by the binary frame that it describes.
Ours: `resume_token`, `chunk_sha256`, `chunk_link` (the chunk's link of the signed chain) and where a chunk stands in
the stream; `streaming_buffer_seconds` opts in to credits, told by `session.playback`.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import ConfigDict, Field

from serve.records import Segment, VideoRecord
from serve.wire.dialects import EXTRA_NAMES, read_json
from serve.wire.problems import Problem
from serve.wire.schemas import InteractionRequest, VideoExtra, VideoRequest, WireRequest, parse

MAX_WINDOW_S = 30.0


class StreamingPacing(WireRequest):
    """vLLM-Omni's pacing by what the viewer has played; limits of bytes and idleness are this service's own."""

    model_config = ConfigDict(extra="ignore")
    enabled: bool = True
    mode: Literal["client_playhead"] = "client_playhead"
    max_lead_ms: float = Field(2000, gt=0, le=1000 * MAX_WINDOW_S)


class SessionStart(VideoRequest):
    """Begins a stream, or goes on with one: then `resume_token` stands alone, the newest one that was received."""

    type: Literal["session.start"]
    prompt: str = ""
    format: Literal["m4s"] = "m4s"
    streaming_buffer_seconds: float | None = Field(None, gt=0, le=MAX_WINDOW_S)
    streaming_pacing: StreamingPacing | None = Field(None, description="The newer way to say streaming_buffer_seconds")
    resume_token: str | None = Field(None, max_length=160)
    extra: VideoExtra = Field(default_factory=lambda: VideoExtra(pacing="realtime"), validation_alias=EXTRA_NAMES)

    @property
    def window_s(self) -> float | None:
        """How far chunks may be sent ahead of the viewer; None: he tells no position, and gets them as they come."""
        pacing = self.streaming_pacing
        if pacing is None:
            return self.streaming_buffer_seconds
        return pacing.max_lead_ms / 1000 if pacing.enabled else None


class SessionPlayback(WireRequest):
    """How far the viewer has played; seconds of the stream."""

    type: Literal["session.playback"]
    position_seconds: float = Field(ge=0)


class SessionPing(WireRequest):
    model_config = ConfigDict(extra="ignore")
    type: Literal["session.ping"]


class SessionStop(WireRequest):
    model_config = ConfigDict(extra="ignore")
    type: Literal["session.stop"]


Control = InteractionRequest | SessionPlayback | SessionPing | SessionStop
_KINDS: dict[str, type[WireRequest]] = {
    "session.interaction": InteractionRequest,
    "session.playback": SessionPlayback,
    "session.ping": SessionPing,
    "session.stop": SessionStop,
}


def parse_start(text: str) -> SessionStart:
    """The first message of a session; `Problem` says what is wrong."""
    message = _object(text)
    if message.get("type") != "session.start":
        raise Problem(400, "unexpected_message", "the first message is session.start", param="type")
    start: SessionStart = parse(SessionStart, message, text=False)
    return start


def parse_control(text: str) -> Control:
    """Any later message; `Problem` says what is wrong."""
    message = _object(text)
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        allowed = ", ".join(_KINDS)
        raise Problem(400, "unknown_message", f"there is no such message: allowed are {allowed}", param="type")
    control: Control = parse(_KINDS[kind], message, text=False)
    return control


def started(video: VideoRecord, chunk: int, window_s: float | None, resume_token: str) -> dict[str, Any]:
    """The stream begins, or goes on with that chunk."""
    width, _, height = video.size.partition("x")
    config = {
        "model": video.model,
        "prompt": video.prompt,
        "width": int(width),
        "height": int(height),
        "fps": video.fps,
        "num_frames": video.frames or None,
        "seed": video.seed,
        "extra_params": {"pacing": video.pacing.value, "endless": video.endless},
    }
    if window_s is not None:
        config["streaming_buffer_seconds"] = window_s
    about = {"type": "video.start", "request_id": video.id, "format": "m4s", "mime": video.mime, "config": config}
    if video.ignored:
        about["ignored"] = list(video.ignored)
    return about | {"next_chunk": chunk, "resume_token": resume_token}


def chunk_metadata(
    video: VideoRecord, segment: Segment, chunk: int, transport_chunk: int, byte_length: int, resume_token: str
) -> dict[str, Any]:
    """What the binary frame that follows holds."""
    return {
        "type": "video.chunk_metadata",
        "request_id": video.id,
        "kind": "media",
        "transport_chunk_index": transport_chunk,
        "generation_chunk_index": chunk,
        "num_frames": segment.frames,
        "byte_length": byte_length,
        "started_event_ids": segment.events.started,
        "active_event_ids": segment.events.active,
        "completed_event_ids": segment.events.completed,
        "chunk_sha256": segment.link.sha256 if segment.link else "",
        "chunk_link": segment.link.as_answer() if segment.link and segment.link.signature else None,
        "resume_token": resume_token,
    }


def done(video: VideoRecord, chunks: int, stopped: bool, stop_latency_s: float | None = None) -> dict[str, Any]:
    """The stream is over; `stop_latency_s` is told where its viewer stopped it: from his word to this one."""
    about = {"type": "session.done", "request_id": video.id, "chunks": chunks, "stopped": stopped}
    return about if stop_latency_s is None else {**about, "stop_latency_s": round(stop_latency_s, 4)}


def draining(video: VideoRecord, resume_token: str) -> dict[str, Any]:
    """This gateway ends: whoever shows the token goes on with the next chunk through another one, at once."""
    return {"type": "session.draining", "request_id": video.id, "resume_token": resume_token}


def queued(video: VideoRecord, event_id: str) -> dict[str, Any]:
    about = {"type": "session.interaction.queued", "request_id": video.id, "event_id": event_id}
    return {**about, "received_at": round(time.time(), 3)}


def failed(problem: Problem, request_id: str | None = None, event_id: str | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"type": "error", "code": problem.code, "message": problem.detail}
    optional = {
        "param": problem.param,
        "request_id": request_id,
        "event_id": event_id,
        "retry_after_seconds": problem.retry_after_s,
    }
    return message | {name: value for name, value in optional.items() if value is not None}


def event_id_of(text: str) -> str | None:
    """The event that a message speaks of, where it can be told, so that an error can name it."""
    try:
        event_id = _object(text)["interaction"]["event_id"]
    except (Problem, KeyError, TypeError):
        return None
    return event_id if isinstance(event_id, str) and len(event_id) <= 128 else None


def _object(text: str) -> dict[str, Any]:
    try:
        message = read_json(text)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "invalid_json", "the message is not JSON") from error
    if not isinstance(message, dict):
        raise Problem(400, "invalid_json", "the message is not a JSON object")
    return message
