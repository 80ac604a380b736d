"""A session's snapshot: all that another engine needs to go on with its next chunk, as safetensors with a JSON header.

Nothing in it is pickled. Sizes follow by formula: `latents_bytes` (6.6 MB at 832x480 in bfloat16) instead of 3.45 GB
of K/V, and `increment_bytes` (1.2 MB) for what one more chunk adds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diagonal.config import Config, ServeConfig
from diagonal.diffusion.rollout import KeptChunk
from diagonal.engine.drift import DriftMonitor
from diagonal.engine.specs import Blend, Event, PromptChange, SessionSpec, Timeline
from diagonal.geometry import ChunkGeometry
from diagonal.model.cache import latents_dtype
from diagonal.schedule import StepSchedule

SCHEMA_VERSION = 1
_LENGTH_BYTES = 8  # safetensors: the size of its header, little endian, before it
_HEADER = "diagonal_snapshot"


class SnapshotError(ValueError):
    """A snapshot that cannot be read, or that this engine must not go on from."""


class ReleaseLike(Protocol):
    """What names a release."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Config: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Identity:
    """What a session can only go on with: the release's name, the hash of its files, and of what decides a chunk."""

    release: str
    content: str
    config: str

    @classmethod
    def of(cls, release: ReleaseLike) -> Identity:
        """The hash of the configuration leaves out what differs between machines: limits, paths, training; and the
        options of serving that are not used, so that a snapshot from before they existed is still this engine's."""
        config = release.config
        files = {name: entry["sha256"] for name, entry in release.manifest["files"].items()}
        decides = {
            "geometry": asdict(config.geometry),
            "schedule": asdict(config.schedule),
            "cache": asdict(config.cache),
            "text_tokens": config.model.text_tokens,
            "compute_dtype": config.model.compute_dtype,
            "decoder_history_frames": config.serve.decoder_history_frames,
        }
        if config.model.adapters:
            decides["adapters"] = list(config.model.adapters)
        usual = ServeConfig()
        for name in ("decoder", "linear_dtype", "cache_dtype"):
            if (value := getattr(config.serve, name)) != getattr(usual, name):
                decides[name] = value
        return cls(release.name, _hash(files), _hash(decides))

    def check(self, other: Identity, what: str) -> None:
        """`SnapshotError` naming the first part in which `other`, of that snapshot or log, differs."""
        for part, wanted in asdict(self).items():
            if (found := asdict(other)[part]) != wanted:
                raise SnapshotError(f"{what}.{part} = {found!r}: allowed is this engine's, {wanted!r}")


@dataclass(frozen=True)
class MediaTimeline:
    """Where the stream's media stand: an encoder that takes over writes fragment `chunks` from `pixel_frames` on."""

    chunks: int
    pixel_frames: int
    fps: int

    @property
    def pts_s(self) -> float:
        """Presentation time of the next chunk's first frame."""
        return self.pixel_frames / self.fps


@dataclass(frozen=True)
class Snapshot:
    """A session as it was after a chunk. Latents are `[c, f, h, w]`.

    `kept` are the inputs of the forwards that wrote the K/V in its window, `history` the newest clean latents, from
    which a decoder is rebuilt. `ahead_s` is the media that its viewer had left, without reference to any clock; None
    before the first chunk. `pending` prompt changes apply to the next chunk. `events` is None unless it is recorded.
    """

    identity: Identity
    spec: SessionSpec
    schedule: StepSchedule
    shortened: bool
    next_chunk: int
    media: MediaTimeline
    ahead_s: float | None
    timeline: Timeline
    pending: tuple[PromptChange, ...] = ()
    kept: tuple[KeptChunk, ...] = ()
    history: Tensor | None = None
    reanchored: int = 0
    drift: Mapping[str, Any] = field(default_factory=lambda: DriftMonitor().to_dict())
    events: tuple[Event, ...] | None = None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the latents; beside them a snapshot is a few hundred bytes and its prompts."""
        parts = [item.written for item in self.kept] + ([] if self.history is None else [self.history])
        return sum(part.numel() * part.element_size() for part in parts)

    def to_bytes(self, since_chunk: int = -1) -> bytes:
        """safetensors with a JSON header. With `since_chunk`, only the latents of later chunks: `from_bytes` then
        needs the snapshot as it was after that chunk."""
        tensors = {f"kept.{item.chunk}": item.written for item in self.kept if item.chunk > since_chunk}
        if self.history is not None and since_chunk < self.next_chunk - 1:
            newer = (self.next_chunk - 1 - since_chunk) * self.kept[-1].frames
            tensors["history"] = self.history[:, -newer:]
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return safetensors.torch.save(plain, metadata={_HEADER: json.dumps(self._header(since_chunk))})

    def _header(self, since_chunk: int) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "since_chunk": since_chunk,
            "identity": asdict(self.identity),
            "spec": asdict(self.spec),
            "schedule": asdict(self.schedule),
            "shortened": self.shortened,
            "next_chunk": self.next_chunk,
            "media": asdict(self.media),
            "ahead_s": self.ahead_s,
            "timeline": asdict(self.timeline),
            "pending": [asdict(change) for change in self.pending],
            "kept": [[item.chunk, item.level, item.refreshed] for item in self.kept],
            "history_frames": 0 if self.history is None else self.history.shape[1],
            "reanchored": self.reanchored,
            "drift": dict(self.drift),
            "events": None if self.events is None else [asdict(event) for event in self.events],
        }

    @classmethod
    def from_bytes(cls, data: bytes, base: Snapshot | None = None) -> Snapshot:
        """What `to_bytes` wrote; `SnapshotError` when it is broken, of another version, or does not follow `base`."""
        header = _read_header(data)
        try:
            tensors = safetensors.torch.load(data)
            return _build(header, tensors, _base_of(header, base))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, SafetensorError) as error:
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(f"snapshot: {type(error).__name__}: {error}") from error


def _read_header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])["__metadata__"][_HEADER])
        version = header["schema"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SnapshotError("snapshot: it has no header; allowed is what `to_bytes` wrote, whole") from error
    if version != SCHEMA_VERSION:
        raise SnapshotError(f"snapshot.schema = {version!r}: allowed is {SCHEMA_VERSION}")
    return dict(header)


def _base_of(header: Mapping[str, Any], base: Snapshot | None) -> Snapshot | None:
    """The snapshot that an incremental one builds upon; None for a whole one."""
    since = header["since_chunk"]
    if since < 0:
        return None
    if base is None or base.next_chunk != since + 1 or base.spec.session_id != header["spec"]["session_id"]:
        raise SnapshotError(f"snapshot.since_chunk = {since}: needed is the same session's snapshot after that chunk")
    return base


def _build(header: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Snapshot | None) -> Snapshot:
    before = {} if base is None else {item.chunk: item.written for item in base.kept}
    kept = tuple(
        KeptChunk(chunk, tensors[f"kept.{chunk}"] if f"kept.{chunk}" in tensors else before[chunk], level, *refreshed)
        for chunk, level, *refreshed in header["kept"]
    )
    timeline, events = header["timeline"], header["events"]
    return Snapshot(
        identity=Identity(**header["identity"]),
        spec=SessionSpec(**header["spec"]),
        schedule=StepSchedule(**header["schedule"]),
        shortened=bool(header["shortened"]),
        next_chunk=int(header["next_chunk"]),
        media=MediaTimeline(**header["media"]),
        ahead_s=header["ahead_s"],
        timeline=Timeline(**{**timeline, "blends": tuple(Blend(**blend) for blend in timeline["blends"])}),
        pending=tuple(PromptChange(**change) for change in header["pending"]),
        kept=kept,
        history=_history(header["history_frames"], tensors.get("history"), None if base is None else base.history),
        reanchored=int(header["reanchored"]),
        drift=DriftMonitor.from_dict(header["drift"]).to_dict(),
        events=None if events is None else tuple(Event(**event) for event in events),
    )


def _history(frames: int, newer: Tensor | None, older: Tensor | None) -> Tensor | None:
    parts = [part for part in (older, newer) if part is not None]
    if frames == 0:
        return None
    joined = torch.cat(parts, dim=1)[:, -frames:].contiguous()
    if joined.shape[1] != frames:
        raise SnapshotError(f"snapshot.history_frames = {frames}: there are {joined.shape[1]}")
    return joined


def check_latents(snapshot: Snapshot, geometry: ChunkGeometry, window_chunks: int) -> None:
    """`SnapshotError` when the latents are not such that a session of that geometry could have left."""
    channels, _, height, width = geometry.chunk_shape()[1:]
    chunks = [item.chunk for item in snapshot.kept]
    rising = chunks == sorted(set(chunks)) and len(chunks) < window_chunks
    begun = snapshot.next_chunk > 0
    if not rising or (begun and (not chunks or chunks[-1] != snapshot.next_chunk - 1)) or begun == (not chunks):
        raise SnapshotError(f"snapshot.kept = {chunks}: allowed are rising chunks that end before the next one")
    for item in snapshot.kept:
        found, wanted = (
            tuple(item.written.shape),
            tuple(geometry.frames_shape(geometry.chunk_frames + item.refreshed)[1:]),
        )
        if found != wanted:
            raise SnapshotError(f"snapshot.kept: shape {found}, allowed is {wanted}")
    if begun and (snapshot.history is None or _without_frames(snapshot.history) != (channels, height, width)):
        raise SnapshotError(f"snapshot.history: allowed is [{channels}, frames, {height}, {width}]")
    if snapshot.media.pixel_frames != geometry.pixel_start(snapshot.next_chunk):
        wanted_frames = geometry.pixel_start(snapshot.next_chunk)
        raise SnapshotError(f"snapshot.media.pixel_frames = {snapshot.media.pixel_frames}: allowed is {wanted_frames}")


def _without_frames(latents: Tensor) -> tuple[int, ...]:
    return (latents.shape[0], *latents.shape[2:]) if latents.ndim == 4 else ()


def frame_bytes(config: Config) -> int:
    """Bytes of one latent frame as a session keeps it: channels * height * width * element size."""
    return torch.Size(config.geometry.frames_shape(1)).numel() * latents_dtype(config).itemsize


def latents_bytes(config: Config) -> int:
    """Most bytes of latents in a snapshot: the window's inputs but for the chunk in progress, and the history."""
    kept_frames = config.cache.window_frames - config.geometry.chunk_frames
    kept_frames += sum(map(config.schedule.refreshes_newest, range(kept_frames // config.geometry.chunk_frames)))
    return (kept_frames + config.serve.decoder_history_frames) * frame_bytes(config)


def increment_bytes(config: Config) -> int:
    """Bytes of latents that one more chunk adds: its input and its clean latents."""
    return (2 * config.geometry.chunk_frames + config.schedule.clean_newest) * frame_bytes(config)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def merged(parts: Sequence[bytes]) -> Snapshot:
    """The newest snapshot of a whole one and the increments that followed it, oldest first."""
    snapshot: Snapshot | None = None
    for data in parts:
        snapshot = Snapshot.from_bytes(data, snapshot)
    if snapshot is None:
        raise SnapshotError("snapshot: there is none")
    return snapshot
