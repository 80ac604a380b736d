"""Sessions: what a viewer asked for, the state machine of its life, its prompt timeline, and its snapshot."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from diagonal.diffusion.rollout import KeptChunk
from diagonal.errors import require
from diagonal.geometry import ChunkGeometry
from diagonal.model.cache import KVCache
from diagonal.model.vae import DecoderState
from diagonal.schedule import StepSchedule

MAX_SEED = 2**63 - 1


class SessionState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


MOVES: Mapping[SessionState, frozenset[SessionState]] = {
    SessionState.QUEUED: frozenset({SessionState.RUNNING, SessionState.CANCELLED, SessionState.FAILED}),
    SessionState.RUNNING: frozenset(
        {SessionState.PAUSED, SessionState.DONE, SessionState.CANCELLED, SessionState.FAILED}
    ),
    SessionState.PAUSED: frozenset({SessionState.RUNNING, SessionState.CANCELLED, SessionState.FAILED}),
    SessionState.DONE: frozenset(),
    SessionState.CANCELLED: frozenset(),
    SessionState.FAILED: frozenset(),
}


class IllegalMoveError(RuntimeError):
    """A state change that the session's life does not allow."""


@dataclass(frozen=True)
class SessionSpec:
    """What was asked for. `pixel_frames` None is an endless stream; `schedule` None is the release's own."""

    session_id: str
    prompt: str
    seed: int
    pixel_frames: int | None
    schedule: str | None = None

    def __post_init__(self) -> None:
        require(self.session_id != "", "session_id", self.session_id, "a name that is not empty")
        require(self.prompt.strip() != "", "prompt", self.prompt, "a text that is not empty")
        require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"a whole number from 0 to {MAX_SEED}")
        require(
            self.pixel_frames is None or self.pixel_frames >= 1,
            "pixel_frames", self.pixel_frames, "a whole number of at least 1, or null for an endless stream",
        )


@dataclass(frozen=True)
class PromptChange:
    """A new prompt from the next chunk on; `transition_chunks` 0 is a hard switch, n interpolates over n chunks."""

    event_id: str
    prompt: str
    transition_chunks: int = 0

    def __post_init__(self) -> None:
        require(self.prompt.strip() != "", "prompt", self.prompt, "a text that is not empty")
        require(
            0 <= self.transition_chunks <= 64,
            "transition_chunks", self.transition_chunks, "a whole number from 0 to 64",
        )


@dataclass(frozen=True)
class Event:
    """One entry of the event log: what happened before that chunk was generated (METHOD I.11)."""

    kind: str
    chunk: int
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChunkResult:
    """One generated chunk: pixels `[f, h, w, 3]` uint8 on the CPU, surplus frames of the last chunk dropped.

    With `error` set the session has failed and the pixels are empty.
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


@dataclass(frozen=True)
class Transition:
    """A prompt change under way: from one text to another, `done` of `total` chunks."""

    start: Tensor
    target: Tensor
    total: int
    done: int = 0

    def advance(self) -> Transition:
        return Transition(self.start, self.target, self.total, self.done + 1)

    @property
    def text(self) -> Tensor:
        """Embeddings `[1, l, n]` at this point of the change."""
        return torch.lerp(self.start, self.target, min(1.0, self.done / self.total))


@dataclass(frozen=True)
class Snapshot:
    """What another replica needs to go on with the next chunk: kept inputs, decoder history, progress, timeline."""

    spec: SessionSpec
    next_chunk: int
    kept: tuple[KeptChunk, ...]
    history: Tensor
    text: Tensor
    transition: Transition | None
    pending: tuple[PromptChange, ...]
    events: tuple[Event, ...]


@dataclass
class Session:
    """One stream on this device. The pool owns its memory, the session its progress, the engine the step."""

    spec: SessionSpec
    schedule: StepSchedule
    cache: KVCache
    decoder_state: DecoderState
    history_frames: int
    state: SessionState = SessionState.QUEUED
    next_chunk: int = 0
    text: Tensor | None = None
    transition: Transition | None = None
    pending: deque[PromptChange] = field(default_factory=deque)
    kept: list[KeptChunk] = field(default_factory=list)
    history: Tensor | None = None
    events: list[Event] = field(default_factory=list)
    started_s: float | None = None
    asked: bool = False

    def move(self, state: SessionState) -> None:
        """Change state; `IllegalMoveError` where the state machine does not allow it."""
        if state not in MOVES[self.state]:
            raise IllegalMoveError(f"session {self.spec.session_id}: {self.state} -> {state} is not allowed")
        self.state = state

    @property
    def ended(self) -> bool:
        return not MOVES[self.state]

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
        """Seconds until a viewer who began with the first chunk runs out of media; minus infinity before it."""
        if self.started_s is None:
            return float("-inf")
        return geometry.pixel_start(self.next_chunk) / geometry.pixel_fps - (now_s - self.started_s)

    def remember(self, chunk: KeptChunk, clean: Tensor) -> None:
        """Keep a finished chunk's cache input and its clean latents `[c, f, h, w]`, within window and history."""
        self.kept.append(chunk)
        if len(self.kept) >= self.cache.window_chunks:
            del self.kept[self.cache.sink_chunks]
        history = clean if self.history is None else torch.cat((self.history, clean), dim=1)
        self.history = history[:, -self.history_frames :].contiguous()
