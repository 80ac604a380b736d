"""What gateway, store and replica tell each other: small frozen records, no behaviour, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Of a video, by OpenAI's names; `cancelled` is ours: its last reader left it, or its owner did."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self not in (Status.QUEUED, Status.IN_PROGRESS)


class Pacing(StrEnum):
    """Whether chunks are made as fast as possible, or just ahead of who watches."""

    NONE = "none"
    REALTIME = "realtime"


@dataclass(frozen=True)
class ModelInfo:
    """What a replica serves: `width`, `height` are the model's own; a file is `scale` times as large."""

    name: str
    width: int
    height: int
    fps: int
    clip_frames: int
    scales: tuple[int, ...]
    max_frames: int
    max_prompt_characters: int
    lead_s: float

    def size(self, scale: int) -> str:
        return f"{self.width * scale}x{self.height * scale}"


@dataclass(frozen=True)
class Interaction:
    """A prompt change; `chunk` and `pixel_frame` say where it took effect, None while it is queued."""

    event_id: str
    prompt: str
    transition_chunks: int = 0
    chunk: int | None = None
    pixel_frame: int | None = None


@dataclass(frozen=True)
class VideoRecord:
    """One video, as the store keeps it. Frames are pixel frames; times are seconds since 1970.

    `replica` is the one that holds its session. `epoch` counts its drivers: only the newest may add chunks.
    `orphan` is told with every answer: nobody drives it, so whoever asks should.
    """

    id: str
    model: str
    prompt: str
    seed: int
    frames: int
    fps: int
    scale: int
    size: str
    pacing: Pacing
    created_at: float
    status: Status = Status.QUEUED
    replica: str = ""
    mime: str = "video/mp4"
    chunks_done: int = 0
    frames_done: int = 0
    completed_at: float | None = None
    error_code: str | None = None
    error_message: str | None = None
    epoch: int = 0
    orphan: bool = False
    interactions: tuple[Interaction, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A replica took a session; `init` is the stream's initialisation segment."""

    replica: str
    mime: str
    init: bytes


@dataclass(frozen=True)
class Refused:
    """A replica did not do what it was asked; `code` is for programs, `retry_after_s` is set when it is full."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True)
class EncodedChunk:
    """One chunk of one session: a `moof` + `mdat`."""

    chunk: int
    data: bytes
    frames: int
    first_pixel_frame: int
    applied_event_ids: tuple[str, ...]
    last: bool


@dataclass(frozen=True)
class Verdict:
    """What the store tells a driver: whether to go on, whether another one drives now, and who watches."""

    go: bool
    superseded: bool = False
    readers: int = 0
    had_reader: bool = False


@dataclass(frozen=True)
class Segment:
    """What the store tells a reader who asked for a chunk: its bytes, or why there are none (yet)."""

    status: Status
    data: bytes | None = None
    frames: int = 0
    orphan: bool = False
