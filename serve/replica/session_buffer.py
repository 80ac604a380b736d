"""One session at a replica: how far it was asked for, its encoder, and the chunks that are made but not given up."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from diagonal.engine.session import ChunkResult
from diagonal.engine.snapshot import Snapshot
from diagonal.media.encode import ChunkEncoder
from diagonal.media.watermark import Watermark
from serve.records import EncodedChunk, Refused
from serve.tracing import SessionTrace

_MOST_BYTES = 1 << 20  # with so many no further chunk comes along in a pull


@dataclass
class Slot:
    """One session: how far it was asked for, and what is made but not yet given up."""

    encoder: ChunkEncoder
    chunks: dict[int, asyncio.Future[EncodedChunk | Refused]] = field(default_factory=dict)
    results: asyncio.Queue[ChunkResult] = field(default_factory=asyncio.Queue)
    changed_at: dict[str, float] = field(default_factory=dict)
    wanted: int = -1
    made: int = -1
    over: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    paused_at: float | None = None
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    mark: Watermark | None = None
    trace: SessionTrace | None = None

    def chunk(self, index: int) -> asyncio.Future[EncodedChunk | Refused]:
        if index not in self.chunks:
            self.chunks[index] = asyncio.get_running_loop().create_future()
        return self.chunks[index]

    def ready(self, chunk: int, ahead: int) -> tuple[EncodedChunk, ...]:
        """That chunk, which is there, and of the `ahead` behind it those that are there too."""
        found: list[EncodedChunk] = []
        for index in range(chunk, chunk + ahead + 1):
            future = self.chunks.get(index)
            made = future.result() if future is not None and future.done() else None
            if not isinstance(made, EncodedChunk) or sum(len(one.data) for one in found) >= _MOST_BYTES:
                break
            found.append(made)
        return tuple(found)

    def give_up_before(self, chunk: int) -> None:
        """Forget chunks before that one; of the snapshots the newest before it stays, to go on from."""
        for index in [index for index in self.chunks if index < chunk]:
            del self.chunks[index]
        for index in [index for index in self.snapshots if index < chunk - 1]:
            del self.snapshots[index]
