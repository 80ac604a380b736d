"""The pipeline: a batch is decoded and copied to the host on a stream of its own, beside the next batch's forwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from diagonal.diffusion.rollout import DenoisedChunk
from diagonal.engine.budget import ChunkKind
from diagonal.engine.chunk_maker import ChunkMaker, Emitted, SessionError
from diagonal.engine.session import Session

STREAMS = 2  # a batch on its way to the host, and the next one
URGENT = -1  # a chunk that is nearly out goes before the forwards of the next: they would hold it up for their length


class DecodeStream:
    """Work that may run beside the device's current stream; without a CUDA stream, it runs in its turn.

    `previous` decodes the batch before: both may decode for one session, in order.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None, previous: torch.cuda.Stream | None = None) -> None:
        self._stream, self._previous = stream, previous

    @contextmanager
    def after(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Run the block's work, which reads these tensors, behind all that the current and the previous stream have.

        Their memory is not reused before this stream is done, also when they are freed meanwhile.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        if self._previous is not None:
            self._stream.wait_stream(self._previous)
        with torch.cuda.stream(self._stream):
            for tensor in tensors:
                tensor.record_stream(self._stream)
            yield

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run the block's work behind this stream's own: a copy to the host then waits for nothing else."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield


def decode_streams(device: torch.device, beside: bool) -> Iterator[DecodeStream]:
    """A stream for each batch, by turns; `beside` the current one where the device has streams."""
    if not beside or device.type != "cuda":
        return cycle([DecodeStream()])
    streams = [torch.cuda.Stream(device, priority=URGENT) for _ in range(STREAMS)]
    previous = [streams[-1], *streams]
    return cycle([DecodeStream(stream, before) for stream, before in zip(streams, previous, strict=False)])


@dataclass(frozen=True)
class StepTimer:
    """When a step began, how many chunks it re-cached first, and whether it rebuilt a decoder's state."""

    started_s: float
    recached: int = 0
    rebuilt: bool = False


@dataclass(frozen=True)
class InFlightBatch:
    """A batch's chunks between denoising and the host; one of them, or all, may have failed.

    By number in the batch: `pixels` on the device, or the error, and `finite`, whether cache and pixels are finite.
    Without `denoised` nothing was denoised.
    """

    sessions: Sequence[Session]
    pixels: Mapping[int, Tensor | SessionError]
    stream: DecodeStream
    started_s: float
    denoised: DenoisedChunk | None = None
    finite: Mapping[int, Tensor] = field(default_factory=dict)
    kind: ChunkKind | None = None
    timer: StepTimer | None = None

    @classmethod
    def failed(cls, session: Session, error: SessionError, started_s: float) -> InFlightBatch:
        """A chunk that could not be made: it comes out in its turn, behind those that were made before it."""
        return cls([session], {0: error}, DecodeStream(), started_s)

    @classmethod
    def decoding(
        cls,
        maker: ChunkMaker,
        sessions: Sequence[Session],
        numbers: Sequence[int],
        denoised: DenoisedChunk,
        stream: DecodeStream,
        started_s: float = 0.0,
        kind: ChunkKind | None = None,
        timer: StepTimer | None = None,
    ) -> InFlightBatch:
        """Give the latents of the sessions of those numbers to the stream, to be decoded."""
        features = [part for one in sessions for part in one.decoder_state.features if isinstance(part, Tensor)]
        with stream.after([denoised.clean, denoised.written, denoised.finite, *features]):
            pixels = maker.decode([sessions[n] for n in numbers], [denoised.clean[n] for n in numbers])
            finite = [_finite(sessions[n], denoised.finite[n]) for n in numbers]
        by_number = dict(zip(numbers, pixels, strict=True)), dict(zip(numbers, finite, strict=True))
        return cls(sessions, by_number[0], stream, started_s, denoised, by_number[1], kind, timer)

    @property
    def sound(self) -> bool:
        """Whether nothing of it is known to have failed."""
        return not any(isinstance(pixels, SessionError) for pixels in self.pixels.values())

    def to_host(self, numbers: Collection[int], maker: ChunkMaker) -> dict[int, Emitted | SessionError]:
        """What the sessions of those numbers show and keep, on the host, or errors; waits for its stream alone."""
        chosen = {number: pixels for number, pixels in self.pixels.items() if number in numbers}
        shown: dict[int, Emitted | SessionError] = {n: p for n, p in chosen.items() if isinstance(p, SessionError)}
        decoded = {n: p for n, p in chosen.items() if not isinstance(p, SessionError)}
        if decoded and self.denoised is not None:
            clean, written = ([part[n] for n in decoded] for part in (self.denoised.clean, self.denoised.written))
            with self.stream.inside():
                emitted = maker.to_host(list(decoded.values()), clean, written, [self.finite[n] for n in decoded])
            shown.update(zip(decoded, emitted, strict=True))
        return shown


def _finite(session: Session, denoised: Tensor) -> Tensor:
    """Whether the session's newest chunk is finite, in the cache and on the screen: on the device, not waited for."""
    shown = session.decoder_state.finite
    return denoised if shown is None else denoised & shown.all()
