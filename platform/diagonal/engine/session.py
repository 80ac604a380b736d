"""Sessions: the state machine of a stream's life, its progress, and what it keeps of the past."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from diagonal.diffusion.rollout import KeptChunk
from diagonal.engine.admission import RECACHE_ONCE, Progress
from diagonal.engine.drift import DriftMonitor
from diagonal.engine.snapshot import Identity, MediaTimeline, Snapshot
from diagonal.engine.specs import MAX_EVENTS, MAX_SEED, Event, PromptChange, SessionSpec, Timeline
from diagonal.geometry import ChunkGeometry
from diagonal.model.cache import KVCache
from diagonal.model.dit import TextContext
from diagonal.model.vae import DecoderState
from diagonal.schedule import StepSchedule

__all__ = [
    "MAX_SEED",
    "MOVES",
    "ChunkResult",
    "Event",
    "IllegalMoveError",
    "PromptChange",
    "Session",
    "SessionInfo",
    "SessionSpec",
    "SessionState",
    "decoder_bytes",
]


class SessionState(StrEnum):
    """QUEUED holds a slot and nothing else, RUNNING its cache and decoder, PAUSED only what a snapshot holds."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


_ENDS = frozenset({SessionState.CANCELLED, SessionState.FAILED})
MOVES: Mapping[SessionState, frozenset[SessionState]] = {
    SessionState.QUEUED: _ENDS | {SessionState.RUNNING, SessionState.PAUSED},
    SessionState.RUNNING: _ENDS | {SessionState.PAUSED, SessionState.DONE},
    SessionState.PAUSED: _ENDS | {SessionState.QUEUED, SessionState.RUNNING},
    SessionState.DONE: frozenset(),
    SessionState.CANCELLED: frozenset(),
    SessionState.FAILED: frozenset(),
}


class IllegalMoveError(RuntimeError):
    """A state change that the session's life does not allow."""

    def __init__(self, session_id: str, before: SessionState, after: SessionState) -> None:
        super().__init__(f"session {session_id}: {before} -> {after} is not allowed")


@dataclass(frozen=True)
class ChunkResult:
    """One generated chunk: pixels `[f, h, w, 3]` uint8 on the CPU, surplus frames of the last chunk dropped.

    With `error` set the session has failed, `code` says where, and the pixels are empty. `snapshot` is the session as
    it was after this chunk: who sends it along with the chunk can go on elsewhere without a gap or a repetition.
    """

    session_id: str
    chunk: int
    pixels: Tensor
    first_pixel_frame: int
    generation_s: float
    forwards: int
    applied_event_ids: tuple[str, ...]
    last: bool
    error: str | None = None
    code: str | None = None
    snapshot: Snapshot | None = None


@dataclass(frozen=True)
class SessionInfo:
    """A reading of one session. `steps` is the schedule it runs, `shortened` whether overload chose that.

    `ahead_s` is the media that its viewer has left (None before the first chunk); `drift` each measure of the newest
    pictures over that of the first.
    """

    state: SessionState
    next_chunk: int
    steps: str
    shortened: bool
    ahead_s: float | None
    cache_bytes: int
    decoder_bytes: int
    latents_bytes: int
    drift: Mapping[str, float]


@dataclass
class Session:
    """One stream on this device. The pool owns its memory, the session its progress, the engine the step.

    `stale` names why its cache and decoder are to be built from `kept` and `history` before the next chunk.
    `reanchor` names why its window is to be cut to sink and newest chunk before it. `wanted` is the last chunk that was
    asked for, `under_way` how many are begun and not out: `next_chunk` and all beside it are of those that are out.
    """

    spec: SessionSpec
    schedule: StepSchedule
    cache: KVCache
    decoder_state: DecoderState
    history_frames: int
    identity: Identity
    shortened: bool = False
    state: SessionState = SessionState.QUEUED
    next_chunk: int = 0
    timeline: Timeline = field(default_factory=lambda: Timeline(()))
    text: TextContext | None = None
    texts: dict[str, Future[Tensor]] = field(default_factory=dict)
    pending: deque[PromptChange] = field(default_factory=deque)
    applying: tuple[PromptChange, ...] = ()
    kept: list[KeptChunk] = field(default_factory=list)
    history: Tensor | None = None
    events: list[Event] = field(default_factory=list)
    drift: DriftMonitor = field(default_factory=DriftMonitor)
    started_s: float | None = None
    ahead_s: float | None = None
    asked_s: float | None = None
    wanted: int = -1
    under_way: int = 0
    pausing: bool = False
    stale: str = ""
    reanchor: str = ""
    reanchored: int = 0
    saved: Snapshot | None = None

    def __post_init__(self) -> None:
        if not self.timeline.blends:
            self.timeline = Timeline.of(self.spec.prompt)

    def move(self, state: SessionState) -> None:
        """Change state; `IllegalMoveError` where the state machine does not allow it."""
        if state not in MOVES[self.state]:
            raise IllegalMoveError(self.spec.session_id, self.state, state)
        self.state = state

    @property
    def ended(self) -> bool:
        return not MOVES[self.state]

    @property
    def live(self) -> bool:
        """Whether it holds a slot: everything but a paused session, until it is closed."""
        return self.state is not SessionState.PAUSED

    @property
    def playing(self) -> bool:
        """Whether the real-time budget counts it."""
        return self.spec.paced and self.live and not self.ended

    @property
    def making(self) -> int:
        """The chunk that is begun next."""
        return self.next_chunk + self.under_way

    @property
    def context_chunks(self) -> int:
        """How many chunks that one attends to."""
        return min(len(self.kept) + self.under_way, self.cache.window_chunks - 1)

    @property
    def settled(self) -> bool:
        """Whether the chunk to be begun follows the one under way as it is: with its text and its cache."""
        return not (self.pending or self.timeline.moving or self.stale or self.reanchor or self.pausing)

    def asks(self, geometry: ChunkGeometry) -> bool:
        """Whether it has a chunk that was asked for and not begun."""
        total = self.total_chunks(geometry)
        return self.making <= self.wanted and (total is None or self.making < total)

    def log(self, kind: str, **detail: Any) -> None:
        """Add to the event log of a recorded session, at the chunk to come; a full one takes no more."""
        if self.spec.record and len(self.events) < MAX_EVENTS:
            self.events.append(Event(kind, self.next_chunk, detail))

    def total_chunks(self, geometry: ChunkGeometry) -> int | None:
        """Chunks to generate, None for an endless stream."""
        return None if self.spec.pixel_frames is None else geometry.chunks_for(self.spec.pixel_frames)

    def shown_pixel_frames(self, geometry: ChunkGeometry, chunk: int) -> int:
        """Pixel frames of that chunk that belong to the stream (fewer in the last one)."""
        frames = geometry.chunk_pixel_frames(chunk)
        if self.spec.pixel_frames is None:
            return frames
        return max(0, min(frames, self.spec.pixel_frames - geometry.pixel_start(chunk)))

    def slack_s(self, geometry: ChunkGeometry, now_s: float) -> float:
        """Seconds until a viewer who played chunks as they came runs out of media; minus infinity before the first."""
        if self.started_s is None:
            return float("-inf")
        return geometry.pixel_start(self.next_chunk) / geometry.pixel_fps - (now_s - self.started_s)

    def ahead_media_s(self, geometry: ChunkGeometry) -> float:
        """Media in the chunks that are under way."""
        frames = geometry.pixel_start(self.making) - geometry.pixel_start(self.next_chunk)
        return frames / geometry.pixel_fps

    def play_from(self, geometry: ChunkGeometry, ahead_s: float | None, now_s: float) -> None:
        """Set the clock so that the viewer has `ahead_s` seconds of media left now."""
        if ahead_s is not None:
            self.started_s = now_s - (geometry.pixel_start(self.next_chunk) / geometry.pixel_fps - ahead_s)

    @property
    def prompts_needed(self) -> tuple[str, ...]:
        """Prompts whose embeddings the next chunk is made from; () where the text stays as it is."""
        newest = self.pending[-1] if self.pending else None
        if newest is not None and newest.transition_chunks <= 1:
            return (newest.prompt,)
        if newest is None and self.text is not None and not self.timeline.moving:
            return ()
        return self.timeline.prompts if newest is None else (*self.timeline.prompts, newest.prompt)

    @property
    def reading(self) -> bool:
        """Whether embeddings that its next chunk needs are still to come."""
        return not all(text.done() for text in self.texts.values())

    def progress(self, geometry: ChunkGeometry, now_s: float) -> Progress:
        """What admission needs to know of it."""
        remaining_s = float("inf")
        if self.spec.pixel_frames is not None:
            to_make = max(0, self.spec.pixel_frames - geometry.pixel_start(self.next_chunk))
            ahead_s = 0.0 if self.started_s is None else max(0.0, self.slack_s(geometry, now_s))
            remaining_s = to_make / geometry.pixel_fps + ahead_s
        return Progress(self.schedule, self.next_chunk, self.total_chunks(geometry), self._recaches(), remaining_s)

    def _recaches(self) -> float:
        """Re-caches by chunk that it is known to need."""
        if self.timeline.moving or any(change.transition_chunks > 1 for change in self.pending):
            return 1.0
        return RECACHE_ONCE if self.pending or self.stale else 0.0

    def remember(self, chunk: KeptChunk, clean: Tensor) -> None:
        """Keep a finished chunk's cache input and its clean latents `[c, f, h, w]`, within window and history.

        They come on the CPU and in the cache's element type: of a bfloat16 network's input that is what the network
        itself reads, so that a re-cache loses nothing.
        """
        self.kept.append(chunk)
        if len(self.kept) >= self.cache.window_chunks:
            del self.kept[self.cache.sink_chunks]
        history = clean if self.history is None else torch.cat((self.history, clean), dim=1)
        self.history = history[:, -self.history_frames :].contiguous()

    def save(self, geometry: ChunkGeometry, ahead_s: float | None) -> Snapshot:
        """Note what another engine needs to go on from here; tensors are referred to, never changed later."""
        media = MediaTimeline(self.next_chunk, geometry.pixel_start(self.next_chunk), geometry.pixel_fps)
        events = tuple(self.events) if self.spec.record else None
        self.saved = Snapshot(
            identity=self.identity,
            spec=self.spec,
            schedule=self.schedule,
            shortened=self.shortened,
            next_chunk=self.next_chunk,
            media=media,
            ahead_s=ahead_s,
            timeline=self.timeline,
            kept=tuple(self.kept),
            history=self.history,
            reanchored=self.reanchored,
            drift=self.drift.to_dict(),
            events=events,
        )
        return self.saved

    def take_over(self, snapshot: Snapshot) -> None:
        """Stand where the snapshot's session stood; cache and decoder are built before the next chunk."""
        self.next_chunk, self.timeline = snapshot.next_chunk, snapshot.timeline
        self.kept, self.history = list(snapshot.kept), snapshot.history
        self.reanchored, self.drift = snapshot.reanchored, DriftMonitor.from_dict(snapshot.drift)
        self.pending = deque(snapshot.pending)
        self.events = list(snapshot.events or ())

    def device_bytes(self) -> int:
        """Bytes beside its cache that it holds on the device: its decoder's features and its text."""
        return decoder_bytes(self.decoder_state) + (0 if self.text is None else self.text.bytes)

    def latents_bytes(self) -> int:
        """Bytes of the latents that it keeps."""
        parts = [item.written for item in self.kept] + ([] if self.history is None else [self.history])
        return sum(part.numel() * part.element_size() for part in parts)


def decoder_bytes(state: DecoderState) -> int:
    """Bytes of the features that a stream's decoder keeps (1.9 GB for Wan's at 832x480)."""
    return sum(part.numel() * part.element_size() for part in state.features if isinstance(part, Tensor))
