"""One connection's way through a video: the initialisation segment, then chunk after chunk as they come."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from diagonal.metrics import MetricsBackend
from diagonal.mp4 import FREE
from serve.actors import StoreApi
from serve.records import Segment, Status, VideoRecord
from serve.rpc import CALL_TIMEOUT_S, UNAVAILABLE, call, call_with_retry

_SEGMENT_WAIT_S = 5.0
_KEEPALIVE_S = 15.0  # proxies cut what is silent for a minute


class BrokenStreamError(Exception):
    """A video failed while it was read: the response is cut, so that nobody takes it for the whole."""


class ChunkReader:
    """Reads one video. `adopt` is called when nobody drives it; `name` tells the store which reader this is.

    One that is `resumed` shows no first frame: what it waits for counts as between two chunks.
    """

    def __init__(
        self,
        video: VideoRecord,
        store: StoreApi,
        adopt: Callable[[], Awaitable[object]],
        metrics: MetricsBackend,
        name: str = "",
        resumed: bool = False,
    ) -> None:
        self._video, self._store, self._adopt, self._metrics = video, store, adopt, metrics
        self.name = name or secrets.token_hex(8)
        self._from_s = time.monotonic() - (0.0 if video.chunks_done else video.age_s)
        self._sent_s = time.monotonic() if resumed else None
        self._ready: dict[int, Segment] = {}  # that came along with the one before

    async def segments(self, chunk: int) -> AsyncIterator[bytes]:
        """The stream from `chunk` on; `BrokenStreamError` when the video fails.

        While nothing is made, as in a pause, empty boxes tell proxies that the connection lives.
        """
        init = await self.read(-1)
        if init is None or init.data is None:
            return
        yield init.data
        while True:
            reading = asyncio.ensure_future(self.read(chunk))
            try:
                while not (await asyncio.wait({reading}, timeout=_KEEPALIVE_S))[0]:
                    yield FREE
                segment = await reading
            finally:
                reading.cancel()
            if segment is None:
                return
            if segment.data is None:
                if segment.gone or segment.status is Status.FAILED:
                    raise BrokenStreamError(self._video.id)
                return
            self.note_sent(segment)
            yield segment.data
            chunk += 1

    async def read(self, chunk: int) -> Segment | None:
        """A chunk (-1 is the initialisation segment), or why there will be none; waits as long as it takes."""

        def ask() -> Awaitable[Segment | None]:
            return self._store.segment(self._video.id, self.name, chunk, _SEGMENT_WAIT_S)

        if chunk in self._ready:
            return self._ready.pop(chunk)
        while True:
            segment = await call_with_retry(ask, _SEGMENT_WAIT_S + CALL_TIMEOUT_S)
            if segment is None or segment.final:
                self._ready = {} if segment is None else dict(enumerate(segment.following, chunk + 1))
                return segment
            if segment.orphan:
                await self._adopt()

    def note_sent(self, segment: Segment) -> None:
        """Count a chunk that is handed to the transport."""
        now_s = time.monotonic()
        if self._sent_s is None:
            self._metrics.observe("diagonal_time_to_first_frame_seconds", now_s - self._from_s)
        else:
            self._metrics.observe("diagonal_chunk_interval_seconds", now_s - self._sent_s)
        self._metrics.inc("diagonal_frames_sent_total", segment.frames)
        self._metrics.inc("diagonal_stream_media_seconds_total", segment.frames / self._video.fps)
        self._sent_s = now_s

    async def tell_position(self, position_s: float, window_s: float) -> None:
        """How far the viewer has played, and how much media he wants ahead."""
        with contextlib.suppress(*UNAVAILABLE):  # the next one says it again
            await call(self._store.playback(self._video.id, self.name, position_s, window_s))

    async def leave(self, return_s: float = 0.0) -> None:
        """Say that nobody reads here any more, or that he may be back within `return_s`."""
        with contextlib.suppress(*UNAVAILABLE):  # the store forgets silent readers
            await call(self._store.leave(self._video.id, self.name, return_s))
