"""What an engine needs of the thing that makes chunks: `ModelRunner` on a device, or a simulation of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion.rollout import DenoisedChunk
from diagonal.engine.session import Session
from diagonal.engine.snapshot import Identity
from diagonal.engine.specs import PromptChange, SessionSpec
from diagonal.model.cache import KVPool, PoolExhaustedError
from diagonal.schedule import StepSchedule

# What a session's own step may fail with; anything else is a fault of the engine, and ends its thread.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError)
OUT_OF_MEMORY = (PoolExhaustedError, MemoryError, torch.OutOfMemoryError)


class SessionError(RuntimeError):
    """Why a session's chunk could not be made; `code` is for programs and metrics."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def stage(code: str) -> Iterator[None]:
    """Turn what fails inside into a `SessionError` of that code, or of `out_of_memory`."""
    try:
        yield
    except SessionError:
        raise
    except OUT_OF_MEMORY as error:
        raise SessionError("out_of_memory", str(error)) from error
    except FAILURES as error:
        raise SessionError(code, str(error)) from error


@dataclass(frozen=True)
class Emitted:
    """One session's part of a step, on the CPU: pixels `[f, h, w, 3]` uint8, and the latents `[c, f, h, w]` that it
    keeps, its clean ones and the input that wrote its cache."""

    pixels: Tensor
    clean: Tensor
    written: Tensor


class ChunkMaker(Protocol):
    """The steps of one chunk, over one pool of cache pages. Not for more than one thread at a time."""

    config: Config
    identity: Identity
    pool: KVPool
    window_chunks: int
    encoded: Event  # set whenever a prompt is encoded

    def new_session(self, spec: SessionSpec, schedule: StepSchedule, shortened: bool = False) -> Session:
        """A session with an empty cache."""

    def request_prompts(self, session: Session) -> None:
        """Have the prompts encoded that its next chunk needs, and let go of others."""

    def prepare(self, session: Session, changes: Sequence[PromptChange] = ()) -> int:
        """Bring text, cache and decoder to the next chunk; returns the forwards of a re-cache. `SessionError`."""

    def denoise(self, batch: Sequence[Session]) -> DenoisedChunk:
        """The shared forwards of prepared sessions with one batch key. `SessionError` when they fail."""

    def decode(self, batch: Sequence[Session], clean: Sequence[Tensor]) -> Sequence[Tensor | SessionError]:
        """Pixels `[f, h, w, 3]` uint8 on the device, of each session's next latents `[c, f, h, w]`, or its error."""

    def draw_ahead(self, batch: Sequence[Session]) -> None:
        """What the chunk after each session's own will need from the host, while the device works."""

    def to_host(
        self, pixels: Sequence[Tensor], clean: Sequence[Tensor], written: Sequence[Tensor], finite: Sequence[Tensor]
    ) -> Sequence[Emitted | SessionError]:
        """What a step's sessions show and keep, in one transfer; an error for what is not finite."""

    def evict(self, session: Session) -> None:
        """Leave nothing of the session on the device; its latents are on the CPU anyway."""

    def synchronize(self) -> None:
        """Wait for the device, where a time is to be measured outside the hot loop."""
