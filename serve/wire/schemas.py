"""Wire types: what a request may say, and how a video is told. OpenAI's Videos shape with this field's extensions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from diagonal.chain import ALGORITHM, Link
from serve.records import Caller, Guest, Interaction, ModelInfo, Provenance, Status, VideoRecord, Viewer
from serve.tokens import CLIENT_SECRET_S
from serve.wire.dialects import EXTRA_NAMES, in_our_words, object_of
from serve.wire.problems import invalid

MAX_SEED = 2**32 - 1
MAX_TRANSITION_CHUNKS = 64
MAX_BODY_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = 128 * 1024
MAX_PENDING = 64
MAX_LINKS = 10_000  # in one answer
MAX_CHUNK = 2**31 - 1
MAX_SHARED_S, SHARED_S = 7 * 24 * 3600, 24 * 3600
EventId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]


class WireRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class VideoExtra(WireRequest):
    """What OpenAI's shape has no place for. With `realtime` chunks are made just ahead of who watches.

    `endless` streams have no length and no finished file: they go on until they are stopped, nobody watches, or the
    model's `max_stream_seconds` are over. They are paced in real time. `record` keeps a log, prompts included, from
    which the video can be made again (`/recording`), until the video is removed.
    """

    pacing: Literal["none", "realtime"] = "none"
    endless: bool = False
    record: bool = False

    @model_validator(mode="after")
    def _endless_is_watched(self) -> Self:
        if self.endless and "pacing" not in self.model_fields_set:
            self.pacing = "realtime"
        if self.endless and self.pacing != "realtime":
            raise ValueError("pacing realtime, for what has no end")
        return self


class VideoRequest(WireRequest):
    """Body of `POST /v1/videos`, as JSON or as a form. What is not given is the model's own."""

    prompt: str
    model: str | None = None
    seconds: float | str | None = Field(None, description="How long it plays; or give num_frames, or extra.endless")
    num_frames: int | None = Field(None, ge=1, description="Pixel frames; any number")
    size: str | None = Field(None, description="WIDTHxHEIGHT, one of the model's sizes")
    width: int | None = None
    height: int | None = None
    fps: int | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    extra: VideoExtra = Field(default_factory=VideoExtra, validation_alias=EXTRA_NAMES)
    _ignored: tuple[str, ...] = ()

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields that were given and mean nothing here."""
        return self._ignored

    @model_validator(mode="wrap")
    @classmethod
    def _of_other_dialects(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """`pacing`, `endless` and `record` stand where people put them; known fields of other services are ignored."""
        if not isinstance(data, dict):
            return handler(data)
        plain, ignored = in_our_words(data, VideoExtra.model_fields)
        made = handler(plain)
        made._ignored = ignored
        return made

    @field_validator("extra", mode="before")
    @classmethod
    def _from_form(cls, value: Any) -> Any:
        return object_of(value)


class EventBody(WireRequest):
    """One of the two: a new prompt from the next chunk on, or whether chunks are made at all."""

    prompt: str | None = None
    action: Literal["pause", "resume"] | None = None


class InteractionBody(WireRequest):
    event_id: EventId = Field(default_factory=lambda: secrets.token_hex(8))
    event: EventBody
    transition_chunks: int = Field(0, ge=0, le=MAX_TRANSITION_CHUNKS)


class InteractionRequest(WireRequest):
    """Body of `POST /v1/videos/{id}/interactions`: vLLM-Omni's `session.interaction` message."""

    type: Literal["session.interaction"] = "session.interaction"
    interaction: InteractionBody


class ExpiresAfter(WireRequest):
    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(default=int(CLIENT_SECRET_S), ge=1, le=int(CLIENT_SECRET_S))


class ClientSecretRequest(WireRequest):
    """Body of `POST /v1/realtime/client_secrets`; all of it may be left out."""

    expires_after: ExpiresAfter = Field(default_factory=ExpiresAfter)


class ViewerRequest(WireRequest):
    """Body of `POST /v1/videos/{id}/viewers`; all of it may be left out.

    `watch` shows the video; `steer` lets its holder change the prompt, too, and `name` is told with his changes.
    """

    role: Literal["watch", "steer"] = "watch"
    name: str = Field(
        "",
        max_length=64,
        pattern=r"^[^\x00-\x1f\x7f-\x9f]*$",
        description="What the owner calls the viewer; without one his id is his name",
    )
    expires_in_s: int = Field(SHARED_S, ge=1, le=MAX_SHARED_S)
    qr_for: str | None = Field(
        None,
        max_length=512,
        pattern=r"^https?://[\x21-\x7e]+$",
        description="This service's address as viewers reach it: the answer then holds a QR code of the watch page",
    )


class ClientSecret(BaseModel):
    """`value` is shown once on a WebSocket upgrade, as the subprotocol `diagonal-client-secret.<value>`."""

    value: str
    expires_at: int


class VideoError(BaseModel):
    code: str
    message: str


class InteractionAnswer(BaseModel):
    """A prompt change; `chunk` and `pixel_frame` say from where on it shows, once it is applied.

    It is dropped when the video ended before its chunk. `made_by` names the viewer who asked for it; null: the owner.
    """

    event_id: str
    kind: Literal["prompt", "pause", "resume"]
    transition_chunks: int
    status: Literal["queued", "applied", "dropped"]
    chunk: int | None
    pixel_frame: int | None
    made_by: str | None


class VideoAnswer(BaseModel):
    """A video. `mime` is what `MediaSource.addSourceBuffer` wants; frames are pixel frames.

    `num_frames` and `seconds` are null where the stream has no end; its `progress` then stays at 0.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str | None
    size: str
    prompt: str
    prompt_tokens: int | None = Field(
        description="Of the whole prompt, told by the answer that makes the video, else null; more than the model's "
        "`max_prompt_tokens` are not read"
    )
    remixed_from_video_id: str | None = None
    ignored: list[str] = Field(
        default_factory=list, description="Fields of the request that mean nothing here; in its own answer alone"
    )
    inference_time_s: float | None = Field(None, description="From the request to the last frame, once it is over")
    error: VideoError | None
    num_frames: int | None
    frames_done: int
    chunks_done: int
    fps: int
    seed: int
    pacing: Literal["none", "realtime"]
    endless: bool
    paused: bool
    mime: str
    interactions: list[InteractionAnswer]

    @classmethod
    def of(cls, video: VideoRecord) -> VideoAnswer:
        error = VideoError(code=video.error_code, message=video.error_message or "") if video.error_code else None
        return cls(
            id=video.id,
            model=video.model,
            status=video.status.value,
            progress=_progress(video),
            created_at=int(video.created_at),
            completed_at=None if video.completed_at is None else int(video.completed_at),
            expires_at=None if video.expires_at is None else int(video.expires_at),
            seconds=None if video.endless else f"{video.frames / video.fps:g}",
            size=video.size,
            prompt=video.prompt,
            prompt_tokens=video.prompt_tokens,
            ignored=list(video.ignored),
            inference_time_s=None if video.completed_at is None else round(video.completed_at - video.created_at, 3),
            error=error,
            num_frames=video.frames or None,
            frames_done=video.frames_done,
            chunks_done=video.chunks_done,
            fps=video.fps,
            seed=video.seed,
            pacing=video.pacing.value,
            endless=video.endless,
            paused=video.paused,
            mime=video.mime,
            interactions=[_interaction(change, video.status.over) for change in video.interactions],
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ViewerAnswer(BaseModel):
    """Somebody who has a token of one video."""

    id: str
    object: Literal["video.viewer"] = "video.viewer"
    video_id: str
    role: Literal["watch", "steer"]
    name: str
    created_at: int
    expires_at: int

    @classmethod
    def of(cls, viewer: Viewer, **more: str | None) -> Self:
        times = {"created_at": int(viewer.created_at), "expires_at": int(viewer.expires_at)}
        about = {"id": viewer.id, "video_id": viewer.video_id, "role": viewer.role.value, "name": viewer.name}
        return cls.model_validate(about | times | more)


class ViewerToken(ViewerAnswer):
    """A new viewer. The token is told this once; addresses are below that of the service.

    Whoever has one of the addresses is the viewer: they are as secret as the token.
    """

    token: str
    watch_path: str = Field(description="A page that plays the video")
    playlist_path: str = Field(description="For any HLS player")
    qr: str | None = Field(description="SVG, where `qr_for` asked for it")


class ViewerList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ViewerAnswer]


class ViewerRevoked(BaseModel):
    id: str
    object: Literal["video.viewer.deleted"] = "video.viewer.deleted"
    deleted: Literal[True] = True


class SharedVideo(BaseModel):
    """A video as its viewers see it: neither its prompt nor whose it is."""

    object: Literal["video.shared"] = "video.shared"
    role: Literal["watch", "steer"]
    name: str
    expires_at: int
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    size: str
    fps: int
    mime: str
    endless: bool
    paused: bool
    chunks_done: int

    @classmethod
    def of(cls, video: VideoRecord, guest: Guest) -> SharedVideo:
        return cls(
            role=guest.viewer.role.value,
            name=guest.viewer.name,
            expires_at=int(guest.viewer.expires_at),
            status=video.status.value,
            size=video.size,
            fps=video.fps,
            mime=video.mime,
            endless=video.endless,
            paused=video.paused,
            chunks_done=video.chunks_done,
        )


class InteractionQueued(BaseModel):
    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    video_id: str
    event_id: str


class ModelLimits(BaseModel):
    max_frames: int
    max_seconds: float
    max_stream_seconds: float = Field(description="How long a stream without an end (`extra.endless`) may go on")
    max_prompt_characters: int
    max_prompt_tokens: int = Field(description="How much of a prompt the model reads: what comes after is cut")
    max_seed: int = MAX_SEED
    max_transition_chunks: int = MAX_TRANSITION_CHUNKS
    max_body_bytes: int = MAX_BODY_BYTES
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_pending_interactions: int = MAX_PENDING
    max_sessions: int | None = Field(None, description="Videos at once of this key's account; null: no limit")
    max_frames_per_minute: int | None = Field(None, description="Frames a minute of this key's account")


class ModelAnswer(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "diagonal"
    promoted: bool
    sizes: list[str]
    fps: int
    default_frames: int
    limits: ModelLimits

    @classmethod
    def of(cls, info: ModelInfo, caller: Caller, max_stream_s: float) -> ModelAnswer:
        limits = ModelLimits(
            max_frames=info.max_frames,
            max_seconds=info.max_frames / info.fps,
            max_stream_seconds=max_stream_s,
            max_prompt_characters=info.max_prompt_characters,
            max_prompt_tokens=info.max_prompt_tokens,
            max_sessions=caller.sessions or None,
            max_frames_per_minute=caller.frames_per_minute or None,
        )
        sizes = [info.size(scale) for scale in info.scales]
        frames = info.clip_frames
        return cls(
            id=info.name, promoted=info.promoted, sizes=sizes, fps=info.fps, default_frames=frames, limits=limits
        )


class LinkAnswer(BaseModel):
    """One chunk's link; bytes in hexadecimal. It is signed over a JSON list, as `diagonal.chain` forms it."""

    chunk: int
    sha256: str
    previous: str = Field(description="Signature of the link before; of chunk 0, SHA-256 of the initialisation segment")
    last: bool
    signature: str
    public_key: str


class ChainAnswer(BaseModel):
    """A stream's chain, as far as it is made and kept. `prompt_salt` opens the hashes in the file's credentials."""

    object: Literal["video.chain"] = "video.chain"
    video_id: str
    algorithm: str = ALGORITHM
    prompt_salt: str
    has_more: bool
    links: list[LinkAnswer]

    @classmethod
    def of(cls, video: VideoRecord, links: Sequence[Link], has_more: bool) -> ChainAnswer:
        told = [LinkAnswer.model_validate(link.as_answer()) for link in links]
        return cls(video_id=video.id, prompt_salt=video.prompt_salt, has_more=has_more, links=told)


class ProvenanceAnswer(BaseModel):
    """What tells where videos of this service come from."""

    chain_algorithm: str = ALGORITHM
    chain_public_key: str = Field(description="Raw, in hexadecimal")
    content_credentials: bool = Field(description="Whether finished files are signed (C2PA)")
    watermark: str | None = Field(description="The invisible watermark in every frame; null: there is none")

    @classmethod
    def of(cls, told: Provenance) -> ProvenanceAnswer:
        return cls(
            chain_public_key=told.public_key,
            content_credentials=told.content_credentials,
            watermark=told.watermark or None,
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAnswer]
    provenance: ProvenanceAnswer


class ErrorMember(BaseModel):
    """OpenAI's part of an error."""

    message: str
    type: str
    param: str | None
    code: str


class ProblemAnswer(BaseModel):
    """Every error: RFC 9457 problem details, with OpenAI's `error` member."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    error: ErrorMember


class Health(BaseModel):
    status: Literal["live", "ready"]


def parse(kind: type[WireRequest], data: object, *, text: bool) -> Any:
    """A request of that kind; `Problem` 422 names what is wrong. From a form (`text`) every value is a string."""
    try:
        return kind.model_validate(data, strict=not text)
    except ValidationError as error:
        raise invalid(error) from None


def _progress(video: VideoRecord) -> int:
    """Per cent; 100 only when the file is there."""
    if video.endless:
        return 0
    return 100 if video.status is Status.COMPLETED else min(99, 100 * video.frames_done // video.frames)


def _interaction(change: Interaction, over: bool) -> InteractionAnswer:
    waits: Literal["queued", "dropped"] = "dropped" if over else "queued"
    return InteractionAnswer(
        event_id=change.event_id,
        kind=change.kind.value,
        transition_chunks=change.transition_chunks,
        status=waits if change.chunk is None else "applied",
        chunk=change.chunk,
        pixel_frame=change.pixel_frame,
        made_by=change.made_by or None,
    )


def request_schemas() -> dict[str, Any]:
    """JSON schemas of errors and of the bodies that routes read themselves, by name, for the API's own description."""
    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (ProblemAnswer, "validation"),
        (VideoRequest, "validation"),
        (InteractionRequest, "validation"),
        (ClientSecretRequest, "validation"),
        (ViewerRequest, "validation"),
    ]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    return dict(schemas["$defs"])
