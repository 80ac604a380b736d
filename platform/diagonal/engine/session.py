"""Sessions: the state machine of a stream's life, its progress, and what it keeps of the past."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from diagonal.diffusion.rollout import KeptChunk
from diagonal.engine.budget import RECACHE_ONCE, ChunkKind, Progress
from diagonal.engine.drift import DriftMonitor
from diagonal.engine.snapshot import Identity, MediaTimeline, Snapshot
from diagonal.engine.specs import MAX_EVENTS, MAX_SEED, Event, PromptChange, SessionSpec, Timeline
from diagonal.geometry import ChunkGeometry
from diagonal.model.cache import KVCache
from diagonal.model.dit import TextContext
from diagonal.model.vae import DecoderState
from diagonal.playback import Playback
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
class ChunkProgress:
    """`next_chunk` is the first that is not out, `in_flight` counts the chunks from it on that are begun already.

    `requested_chunk` is the last that was asked for, `asked_s` when the oldest request that waits came.
    """

    next_chunk: int = 0
    requested_chunk: int = -1
    in_flight: int = 0
    asked_s: float | None = None

    @property
    def making(self) -> int:
        """The chunk that is begun next."""
        return self.next_chunk + self.in_flight


@dataclass
class PromptState:
    """The text of a session: its timeline, the changes that wait, and those that the chunk being made takes in.

    `text` is what the network reads, `embeddings` the prompts' own, which may still be encoded.
    """

    timeline: Timeline
    pending: deque[PromptChange] = field(default_factory=deque)
    applying: tuple[PromptChange, ...] = ()
    embeddings: dict[str, Future[Tensor]] = field(default_factory=dict)
    text: TextContext | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """Prompts whose embeddings the next chunk is made from; () where the text stays as it is."""
        newest = self.pending[-1] if self.pending else None
        if newest is not None and newest.transition_chunks <= 1:
            return (newest.prompt,)
        if newest is None and self.text is not None and not self.timeline.in_transition:
            return ()
        return self.timeline.prompts if newest is None else (*self.timeline.prompts, newest.prompt)

    @property
    def encoding(self) -> bool:
        """Whether embeddings that the next chunk needs are still to come."""
        return not all(embedding.done() for embedding in self.embeddings.values())

    @property
    def changing(self) -> bool:
        """Whether the next chunk's text is another than the one before."""
        return bool(self.pending) or self.timeline.in_transition

    def advance(self, changes: Sequence[PromptChange]) -> bool:
        """Take in changes and move one chunk on; whether the text is another one now."""
        if changes:
            self.applying = tuple(changes)
            self.timeline = self.timeline.change(changes[-1].prompt, changes[-1].transition_chunks)
        moved = self.timeline.in_transition
        self.timeline = self.timeline.advance()
        return moved

    def take_applied(self) -> tuple[str, ...]:
        """The event ids of the changes that the finished chunk took in; they wait no longer."""
        applied, self.applying = tuple(change.event_id for change in self.applying), ()
        for _ in applied:
            self.pending.popleft()
        return applied


@dataclass
class KeptLatents:
    """What cache and decoder are rebuilt from: the inputs that wrote the window, and the newest clean latents.

    They lie on the CPU in the cache's element type: of a bfloat16 network's input that is what the network itself
    reads, so that a re-cache loses nothing.
    """

    window: list[KeptChunk] = field(default_factory=list)
    history: Tensor | None = None

    def add(self, chunk: KeptChunk, clean: Tensor, cache: KVCache, history_frames: int) -> None:
        """Keep a finished chunk's cache input and its clean latents `[c, f, h, w]`, within window and history."""
        self.window.append(chunk)
        if len(self.window) >= cache.window_chunks:
            del self.window[cache.sink_chunks]
        history = clean if self.history is None else torch.cat((self.history, clean), dim=1)
        self.history = history[:, -history_frames:].contiguous()

    @property
    def bytes(self) -> int:
        parts = [item.written for item in self.window] + ([] if self.history is None else [self.history])
        return sum(part.numel() * part.element_size() for part in parts)


@dataclass
class Rebuild:
    """What is to be done to the cache before the next chunk, and why; an empty reason is nothing.

    With `reason`, cache and decoder are built from the kept latents. With `reanchor_reason`, the window is cut to sink
    and newest chunk. `reanchored` is the chunk before which that was done last.
    """

    reason: str = ""
    reanchor_reason: str = ""
    reanchored: int = 0


@dataclass
class Session:
    """One stream on this device. The pool owns its memory, the session its progress, the engine the step."""

    spec: SessionSpec
    schedule: StepSchedule
    cache: KVCache
    decoder_state: DecoderState
    history_frames: int
    identity: Identity
    shortened: bool = False
    state: SessionState = SessionState.QUEUED
    progress: ChunkProgress = field(default_factory=ChunkProgress)
    prompt: PromptState = field(init=False)
    latents: KeptLatents = field(default_factory=KeptLatents)
    rebuild: Rebuild = field(default_factory=Rebuild)
    playback: Playback = field(default_factory=Playback)
    drift: DriftMonitor = field(default_factory=DriftMonitor)
    events: list[Event] = field(default_factory=list)
    pausing: bool = False
    ahead_s: float | None = None
    saved: Snapshot | None = None

    def __post_init__(self) -> None:
        self.prompt = PromptState(Timeline.of(self.spec.prompt))

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
        """Whether it has a slot: everything but a paused session, until it is closed."""
        return self.state is not SessionState.PAUSED

    @property
    def playing(self) -> bool:
        """Whether the real-time budget counts it."""
        return self.spec.paced and self.live and not self.ended

    @property
    def context_chunks(self) -> int:
        """How many chunks the one that is begun next attends to."""
        return min(len(self.latents.window) + self.progress.in_flight, self.cache.window_chunks - 1)

    @property
    def chunk_kind(self) -> ChunkKind:
        """What the cost of its next chunk depends on, beside the size of its batch."""
        return ChunkKind(self.schedule.forwards(self.progress.making), self.context_chunks)

    @property
    def needs_recache(self) -> bool:
        """Whether its cache is written again before its next chunk."""
        return self.prompt.changing or bool(self.rebuild.reason or self.rebuild.reanchor_reason)

    def asks(self, geometry: ChunkGeometry) -> bool:
        """Whether it has a chunk that was asked for and not begun."""
        total, making = self.total_chunks(geometry), self.progress.making
        return making <= self.progress.requested_chunk and (total is None or making < total)

    def begin_chunk(self, changes: Sequence[PromptChange]) -> bool:
        """Run, and take prompt changes in; whether the text is another one now."""
        if self.state is SessionState.QUEUED:
            self.move(SessionState.RUNNING)
        if changes:
            ids, newest = [change.event_id for change in changes], changes[-1]
            self.log("prompt", prompt=newest.prompt, transition_chunks=newest.transition_chunks, event_ids=ids)
        return self.prompt.advance(changes)

    def cut_window(self) -> bool:
        """Keep the sink and the newest chunk alone where that was asked for; whether that is less than before."""
        cause, self.rebuild.reanchor_reason = self.rebuild.reanchor_reason, ""
        if not cause:
            return False
        self.rebuild.reanchored = self.progress.next_chunk
        sink = self.cache.sink_chunks
        if len(self.latents.window) <= sink + 1:
            return False
        del self.latents.window[sink:-1]
        self.log("reanchor", cause=cause)
        return True

    def log(self, kind: str, **detail: Any) -> None:
        """Add to the event log of a recorded session, at the chunk to come; a full one takes no more."""
        if self.spec.record and len(self.events) < MAX_EVENTS:
            self.events.append(Event(kind, self.progress.next_chunk, detail))

    def total_chunks(self, geometry: ChunkGeometry) -> int | None:
        """Chunks to generate, None for an endless stream."""
        return None if self.spec.pixel_frames is None else geometry.chunks_for(self.spec.pixel_frames)

    def shown_pixel_frames(self, geometry: ChunkGeometry, chunk: int) -> int:
        """Pixel frames of that chunk that belong to the stream (fewer in the last one)."""
        frames = geometry.chunk_pixel_frames(chunk)
        if self.spec.pixel_frames is None:
            return frames
        return max(0, min(frames, self.spec.pixel_frames - geometry.pixel_start(chunk)))

    def media_s(self, geometry: ChunkGeometry) -> float:
        """Media in the chunks that are out."""
        return geometry.pixel_start(self.progress.next_chunk) / geometry.pixel_fps

    def slack_s(self, geometry: ChunkGeometry, now_s: float) -> float:
        """Seconds until a viewer who played chunks as they came runs out of media; minus infinity before the first."""
        return self.playback.slack_s(now_s, self.media_s(geometry))

    def in_flight_media_s(self, geometry: ChunkGeometry) -> float:
        """Media in the chunks that are begun and not out."""
        frames = geometry.pixel_start(self.progress.making) - geometry.pixel_start(self.progress.next_chunk)
        return frames / geometry.pixel_fps

    def demand_progress(self, geometry: ChunkGeometry, now_s: float) -> Progress:
        """What admission needs to know of it."""
        remaining_s, next_chunk = float("inf"), self.progress.next_chunk
        if self.spec.pixel_frames is not None:
            to_make = max(0, self.spec.pixel_frames - geometry.pixel_start(next_chunk))
            remaining_s = to_make / geometry.pixel_fps + max(0.0, self.slack_s(geometry, now_s))
        return Progress(self.schedule, next_chunk, self.total_chunks(geometry), self._recaches(), remaining_s)

    def _recaches(self) -> float:
        """Re-caches by chunk that it is known to need."""
        if self.prompt.timeline.in_transition or any(change.transition_chunks > 1 for change in self.prompt.pending):
            return 1.0
        return RECACHE_ONCE if self.prompt.pending or self.rebuild.reason else 0.0

    def save(self, geometry: ChunkGeometry, ahead_s: float | None) -> Snapshot:
        """Note what another engine needs to continue from here; tensors are referred to, never changed later."""
        next_chunk = self.progress.next_chunk
        self.saved = Snapshot(
            identity=self.identity,
            spec=self.spec,
            schedule=self.schedule,
            shortened=self.shortened,
            next_chunk=next_chunk,
            media=MediaTimeline(next_chunk, geometry.pixel_start(next_chunk), geometry.pixel_fps),
            ahead_s=ahead_s,
            timeline=self.prompt.timeline,
            kept=tuple(self.latents.window),
            history=self.latents.history,
            reanchored=self.rebuild.reanchored,
            drift=self.drift.to_dict(),
            events=tuple(self.events) if self.spec.record else None,
        )
        return self.saved

    def take_over(self, snapshot: Snapshot) -> None:
        """Stand where the snapshot's session stood; cache and decoder are built before the next chunk."""
        self.progress.next_chunk = snapshot.next_chunk
        self.prompt.timeline, self.prompt.pending = snapshot.timeline, deque(snapshot.pending)
        self.latents = KeptLatents(list(snapshot.kept), snapshot.history)
        self.rebuild.reanchored, self.drift = snapshot.reanchored, DriftMonitor.from_dict(snapshot.drift)
        self.events, self.saved = list(snapshot.events or ()), snapshot

    def device_bytes(self) -> int:
        """Bytes beside its cache that it has on the device: its decoder's features and its text."""
        return decoder_bytes(self.decoder_state) + (0 if self.prompt.text is None else self.prompt.text.bytes)


def decoder_bytes(state: DecoderState) -> int:
    """Bytes of the features that a stream's decoder keeps (1.9 GB for Wan's at 832x480)."""
    return sum(part.numel() * part.element_size() for part in state.features if isinstance(part, Tensor))
