"""Flights: chunks on their way from the network to the host, a batch each, beside what the device does next."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diagonal.diffusion.rollout import DenoisedChunk
from diagonal.engine.admission import ChunkKind
from diagonal.engine.chunk_maker import ChunkMaker, Emitted, SessionError, emit
from diagonal.engine.lanes import Lane
from diagonal.engine.session import Session


@dataclass(frozen=True)
class Stopwatch:
    """When a step began, how many chunks it re-cached first, and whether it built a decoder's state anew."""

    started_s: float
    recached: int = 0
    rebuilt: bool = False


@dataclass(frozen=True)
class Flight:
    """A batch's next chunks: denoised, and their decoding given to a lane. One of them, or all, may have failed.

    By number in the batch: `pixels` of those that are wanted, or what failed, and whether they are `finite` in the
    cache and on the screen, on the device. Without `done` nothing was denoised.
    """

    batch: Sequence[Session]
    pixels: Mapping[int, Tensor | SessionError]
    lane: Lane
    started_s: float
    done: DenoisedChunk | None = None
    finite: Mapping[int, Tensor] = field(default_factory=dict)
    kind: ChunkKind | None = None
    watch: Stopwatch | None = None

    @classmethod
    def failed(cls, session: Session, error: SessionError, started_s: float) -> Flight:
        """A chunk that could not be made: it comes out in its turn, behind those that were made before it."""
        return cls([session], {0: error}, Lane(), started_s)

    @property
    def whole(self) -> bool:
        """Whether nothing of it is known to have failed."""
        return not any(isinstance(found, SessionError) for found in self.pixels.values())

    def bring(self, wanted: Collection[int], dtype: torch.dtype) -> dict[int, Emitted | SessionError]:
        """What those sessions show and keep, on the host, or what failed: waits for the flight's own lane alone."""
        decoded = {
            number: found
            for number, found in self.pixels.items()
            if number in wanted and not isinstance(found, SessionError)
        }
        brought: dict[int, Emitted | SessionError] = {
            number: found
            for number, found in self.pixels.items()
            if number in wanted and isinstance(found, SessionError)
        }
        if decoded and self.done is not None:
            parts = [[part[number] for number in decoded] for part in (self.done.clean, self.done.written)]
            finite = [self.finite[number] for number in decoded]
            with self.lane.inside():
                emitted = emit(list(decoded.values()), parts[0], parts[1], dtype, finite)
            brought.update(zip(decoded, emitted, strict=True))
        return brought


def decoded_aside(
    maker: ChunkMaker, batch: Sequence[Session], wanted: Sequence[int], done: DenoisedChunk, lane: Lane
) -> tuple[dict[int, Tensor | SessionError], dict[int, Tensor]]:
    """Give the wanted sessions' latents to the lane to be decoded: `Flight.pixels` and `Flight.finite`."""
    with lane.after([done.clean, done.written, done.finite, *_features(batch)]):
        pixels = maker.decode([batch[number] for number in wanted], [done.clean[number] for number in wanted])
        finite = [_finite(batch[number], done.finite[number]) for number in wanted]
    return dict(zip(wanted, pixels, strict=True)), dict(zip(wanted, finite, strict=True))


def _features(batch: Sequence[Session]) -> list[Tensor]:
    """What the sessions' decoders remember on the device."""
    return [part for session in batch for part in session.decoder_state.features if isinstance(part, Tensor)]


def _finite(session: Session, denoised: Tensor) -> Tensor:
    """Whether the session's newest chunk is finite, in the cache and on the screen: on the device, not waited for."""
    shown = session.decoder_state.finite
    return denoised if shown is None else denoised & shown.all()
