"""Encoders at hand: opening one takes as long as a small chunk, and nobody's first frame should wait for that."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor

from diagonal.media.encode import ChunkEncoder

_PAUSE_S = 1.0  # before each that is made anew: those who just began come first


class SpareEncoders:
    """Keeps `count` of them, of one scale. Made inside an event loop; `make` gives one, and later does so on `pool`."""

    def __init__(self, make: Callable[[int], ChunkEncoder], scale: int, count: int, pool: Executor) -> None:
        self._make, self._scale, self._count, self._pool = make, scale, count, pool
        self._spare = deque(make(scale) for _ in range(count))
        self._refill: asyncio.Task[None] | None = None

    def take(self, scale: int, first_pixel_frame: int = 0, sequence: int = 1) -> ChunkEncoder:
        """An encoder that begins a stream, or goes on with one from that pixel frame and fragment."""
        encoder = self._spare.popleft() if scale == self._scale and self._spare else self._make(scale)
        encoder.next_pixel_frame, encoder.next_sequence = first_pixel_frame, sequence
        if self._refill is None or self._refill.done():
            self._refill = asyncio.get_running_loop().create_task(self._fill())
        return encoder

    def close(self) -> None:
        """Make no more, not even for who comes now."""
        self._count = 0
        if self._refill is not None:
            self._refill.cancel()

    async def _fill(self) -> None:
        while len(self._spare) < self._count:
            await asyncio.sleep(_PAUSE_S)
            made = asyncio.get_running_loop().run_in_executor(self._pool, self._make, self._scale)
            self._spare.append(await made)
