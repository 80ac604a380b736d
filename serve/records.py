"""What gateway, store and replica tell each other: small frozen records, no behaviour, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from diagonal.chain import Link
from diagonal.geometry import ChunkGeometry

KEPT_CHUNKS = 96  # of a stream without an end: what a slow viewer, or one who comes back, may still read
MAX_VIEWERS = 100  # of one video
WINDOW_S = 60.0  # over which the frames of an account are counted
LOCAL = "local"  # who a video belongs to when callers of this machine need no key
LIVE = "live-"  # begins the name of a reader that owns its session; the hash of its resume token follows


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
    max_prompt_tokens: int
    lead_s: float
    promoted: bool = field(default=False, kw_only=True)
    release_sha256: str = field(default="", kw_only=True)
    geometry: ChunkGeometry

    def chunks(self, frames: int) -> int | None:
        """Chunks of a video of so many pixel frames; None for 0, which has no end."""
        return self.geometry.chunks_for(frames) if frames else None

    def size(self, scale: int) -> str:
        return f"{self.width * scale}x{self.height * scale}"


class InteractionKind(StrEnum):
    """What an interaction changes: the prompt from the next chunk on, or whether chunks are made at all."""

    PROMPT = "prompt"
    PAUSE = "pause"
    RESUME = "resume"


@dataclass(frozen=True)
class Interaction:
    """What a viewer asked for in mid-stream; `chunk` and `pixel_frame` say where it took effect, None while queued."""

    event_id: str
    prompt: str
    transition_chunks: int = 0
    chunk: int | None = None
    pixel_frame: int | None = None
    kind: InteractionKind = InteractionKind.PROMPT
    made_by: str = ""  # the name of the viewer who asked, '' is the video's owner

    def says_the_same(self, other: Interaction) -> bool:
        """Whether `other` is this one sent again."""
        mine = (self.event_id, self.kind, self.prompt, self.transition_chunks)
        return mine == (other.event_id, other.kind, other.prompt, other.transition_chunks)


@dataclass(frozen=True)
class Caller:
    """Who asks: a key by its public id, and what its account may use. 0 is no limit."""

    key_id: str
    account: str
    sessions: int = 0
    frames_per_minute: int = 0


LOCAL_CALLER = Caller(LOCAL, LOCAL)


class Role(StrEnum):
    """What the holder of a viewer's token may do with the one video that it is of."""

    WATCH = "watch"
    STEER = "steer"


@dataclass(frozen=True)
class Viewer:
    """Somebody whom a video's owner gave a token of that video; `name` is what its owner calls him."""

    id: str
    video_id: str
    role: Role
    name: str
    created_at: float
    expires_at: float


@dataclass(frozen=True)
class Guest:
    """Who asks with a viewer's token, which lasts `left_s` seconds more, and the video's owner."""

    viewer: Viewer
    owner: Caller
    left_s: float


@dataclass(frozen=True)
class Usage:
    """What an account used: videos under way, frames in the last minute, and when the first of these are forgotten."""

    sessions: int
    frames: int
    reset_s: float


@dataclass(frozen=True)
class Idempotency:
    """A caller's own name for one request, and a hash of what it asked for."""

    key: str
    body_hash: str


@dataclass(frozen=True)
class VideoRecord:
    """One video, as the store keeps it. Frames are pixel frames; times are seconds since 1970.

    `replica` is the one that holds its session. `epoch` counts its drivers: only the newest may add chunks.
    `frames` is 0 for a stream without an end.
    `release_sha256` is that of its release's manifest; `prompt_salt` keeps the prompt's hash from being guessed.
    `record`: a log is kept, from which its owner may make it again.
    `owner` is the key that made it, `account` pays for it; `resume_hash` is that of the only resume token that counts.
    `traceparent` names the span that its session's spans lie below; only who made or holds it knows, no store does.
    `prompt_tokens` is what its replica counted, `ignored` what its request said in vain; only the answer to who made
    it has them.
    `age_s` is told with every answer: how long ago it was asked for, by a clock that never jumps. So is `orphan`:
    nobody drives it, so whoever asks should.
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
    owner: str = LOCAL
    account: str = LOCAL
    expires_at: float | None = None
    resume_hash: str = ""
    paused: bool = False
    release_sha256: str = ""
    prompt_salt: str = ""
    record: bool = False
    age_s: float = 0.0
    orphan: bool = False
    traceparent: str = ""
    prompt_tokens: int | None = None
    ignored: tuple[str, ...] = ()
    interactions: tuple[Interaction, ...] = ()

    @property
    def live(self) -> bool:
        """Whether it is made for somebody who watches, and ends when he is gone."""
        return self.pacing is Pacing.REALTIME or bool(self.resume_hash)

    @property
    def endless(self) -> bool:
        """Whether it goes on until it is stopped: no file of it is kept, and of its chunks the newest alone."""
        return self.frames == 0

    @property
    def whole(self) -> bool:
        """Whether every frame is made; the file may not be there yet."""
        return not self.endless and self.frames_done >= self.frames


@dataclass(frozen=True)
class Provenance:
    """What tells where a video came from: the key of live chunks, whether files are signed, which watermark is in."""

    public_key: str
    content_credentials: bool
    watermark: str


@dataclass(frozen=True)
class OpenSession:
    """What a replica needs to begin a video's session; `frames` is None for a stream without an end.

    `paced`: somebody watches while it is made. `record`: keep the log that `recording` gives.
    """

    video_id: str
    prompt: str
    seed: int
    frames: int | None
    scale: int
    paced: bool = False
    record: bool = False
    traceparent: str = ""

    @classmethod
    def of(cls, video: VideoRecord) -> OpenSession:
        about = (video.id, video.prompt, video.seed, video.frames or None, video.scale)
        return cls(*about, video.live, video.record, video.traceparent)


@dataclass(frozen=True)
class Opened:
    """A replica took a session; `init` is the stream's initialisation segment.

    `prompt_tokens` are those of the whole prompt, also where the model reads fewer.
    """

    replica: str
    mime: str
    init: bytes
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Refused:
    """A replica did not do what it was asked; `code` is for programs, `retry_after_s` is set when it is full.

    `reason` says for metrics alone what there was no room in.
    """

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class EncodedChunk:
    """One chunk of one session: a `moof` + `mdat`.

    `snapshot` is what another replica needs to go on after it, or what that adds to the one before; '' where it was not
    asked for, or there is none.
    """

    chunk: int
    data: bytes
    frames: int
    first_pixel_frame: int
    applied_event_ids: tuple[str, ...]
    last: bool
    snapshot: bytes = b""


@dataclass(frozen=True)
class KeptChunk:
    """A chunk whose file is on the disk, with its link in the chain; `snapshot` is a file, too, '' where none is."""

    chunk: EncodedChunk
    file: str
    link: Link
    snapshot: str = ""
    whole_snapshot: bool = False


@dataclass(frozen=True)
class DriveDecision:
    """What the store tells a driver: whether to continue, whether another one drives now, and who watches.

    `position_s` is how far the slowest reader that tells has played, None when nobody does, and `window_s` how much
    media he wants ahead. `returning`: a reader that lost its connection may still come back.
    """

    go: bool
    superseded: bool = False
    readers: int = 0
    had_reader: bool = False
    position_s: float | None = None
    window_s: float | None = None
    returning: bool = False
    paused: bool = False


@dataclass(frozen=True)
class PutChunks:
    """A driver's next chunks for the store; `snapshot` is what another replica needs to continue after the newest.

    Unless `whole_snapshot`, it is what that adds to the one before.
    """

    video_id: str
    epoch: int
    chunks: Sequence[EncodedChunk]
    snapshot: bytes = b""
    whole_snapshot: bool = False


@dataclass(frozen=True)
class ChunkEvents:
    """The prompt changes that began with a chunk, that blend in it, and that are done with it."""

    started: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """What the store tells a reader who asked for a chunk: its bytes, or why there are none (yet)."""

    status: Status
    data: bytes | None = None
    frames: int = 0
    orphan: bool = False
    link: Link | None = None
    events: ChunkEvents = ChunkEvents()
    superseded: bool = False
    error_code: str | None = None
    gone: bool = False  # an endless stream keeps its newest chunks alone
    following: tuple[Segment, ...] = ()  # the chunks behind it that came along

    @property
    def final(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.data is not None or self.status.over or self.superseded or self.gone
