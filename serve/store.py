"""The store: every video with its chunks, its prompt changes and its finished file; gateways keep nothing that matters.

Chunks lie in files until the last one is there; then they become one plain MP4. Who waits for a chunk is told when it
comes. Who drives a video (pulls its chunks from the replica) shows so by asking; one that falls silent is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from diagonal.media.encode import write_fragments
from serve.database import Database
from serve.records import EncodedChunk, Interaction, Segment, Status, Verdict, VideoRecord
from serve.settings import ServeSettings

P = ParamSpec("P")
T = TypeVar("T")
_LOG = logging.getLogger("ray.serve")
_INIT = "init"


class MediaFiles:
    """Where chunks and finished files lie: a folder a video, every file there whole or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, video_id: str, name: str, data: bytes) -> None:
        folder = self._root / video_id
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)

    def read(self, video_id: str, name: str) -> bytes:
        return (self._root / video_id / name).read_bytes()

    def join(self, video_id: str, names: list[str]) -> None:
        """Make the finished file of the named segments, in order."""
        write_fragments(self.path(video_id), (self.read(video_id, name) for name in names))

    def path(self, video_id: str) -> Path:
        """Of the finished file, whether it is there or not."""
        return self._root / video_id / "video.mp4"

    def remove(self, video_id: str) -> None:
        shutil.rmtree(self._root / video_id, ignore_errors=True)


@dataclass
class _Watch:
    """Who waits for news of one video, who reads it and who drives it; lost with the process, and found again."""

    news: asyncio.Event = field(default_factory=asyncio.Event)
    readers: dict[str, float] = field(default_factory=dict)
    had_reader: bool = False
    driven_at: float = float("-inf")
    over: bool = False


class Store:
    """One of them serves all gateways. Times that decide something are monotonic."""

    def __init__(
        self, settings: ServeSettings, *, driver_silence_s: float = 10.0, reader_silence_s: float = 15.0
    ) -> None:
        root = Path(settings.data).expanduser().resolve()
        root.mkdir(parents=True, exist_ok=True)
        self._database = Database(settings.database or f"sqlite:///{root / 'store.sqlite'}")
        self._files = MediaFiles(root / "videos")
        self._driver_silence_s, self._reader_silence_s = driver_silence_s, reader_silence_s
        self._watches: defaultdict[str, _Watch] = defaultdict(_Watch)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")  # one writer, and the loop stays free

    async def create(self, video: VideoRecord, init: bytes) -> None:
        """Keep a new video that a replica has taken, with its initialisation segment; the caller drives it."""
        self._watches[video.id].driven_at = time.monotonic()
        await self._run(self._files.put, video.id, _INIT, init)
        await self._run(self._database.add, video)

    async def get(self, video_id: str) -> VideoRecord | None:
        """The video, None when there is none."""
        video = await self._run(self._database.get, video_id)
        return None if video is None else replace(video, orphan=self._is_orphan(video_id, video.status))

    async def list(self, limit: int, after: str | None = None, ascending: bool = False) -> list[VideoRecord]:
        return await self._run(self._database.newest, limit, after, ascending)

    async def claim(self, video_id: str, epoch: int) -> bool:
        """Become the video's driver, unless another one was faster."""
        claimed = await self._run(self._database.claim, video_id, epoch)
        if claimed:
            self._watches[video_id].driven_at = time.monotonic()
        return claimed

    async def check(self, video_id: str, epoch: int) -> Verdict:
        """A driver asks whether to make the next chunk."""
        video = await self._run(self._database.get, video_id)
        if video is None or video.status.over or video.epoch != epoch:
            return Verdict(go=False, superseded=video is not None and video.epoch != epoch)
        watch = self._watches[video_id]
        watch.driven_at = time.monotonic()
        return Verdict(True, readers=self._count_readers(watch), had_reader=watch.had_reader)

    async def put_chunk(self, video_id: str, epoch: int, chunk: EncodedChunk) -> bool:
        """Keep a chunk and hand it to whoever waits; with the last one the file is made. False: no longer wanted."""
        if not (await self.check(video_id, epoch)).go:
            return False
        await self._run(self._files.put, video_id, str(chunk.chunk), chunk.data)
        if not await self._run(self._database.add_chunk, video_id, epoch, chunk):
            return False
        self._tell(video_id)
        if chunk.last:
            names = [_INIT, *(str(index) for index in range(chunk.chunk + 1))]
            await self._run(self._files.join, video_id, names)
            await self._finish(video_id, Status.COMPLETED)
        return True

    async def end(self, video_id: str, status: Status, code: str | None = None, message: str | None = None) -> bool:
        """A video ends before its last chunk; False when it was over."""
        return await self._finish(video_id, status, code, message)

    async def delete(self, video_id: str) -> VideoRecord | None:
        """Cancel the video if it is not over, and remove it; returns what it was."""
        video = await self._run(self._database.get, video_id)
        if video is None:
            return None
        await self._run(self._database.remove, video_id)
        await self._run(self._files.remove, video_id)
        self._tell(video_id, over=True)
        return video

    async def segment(self, video_id: str, reader: str, chunk: int, wait_s: float) -> Segment | None:
        """The bytes of a chunk (-1 is the initialisation segment), waiting for it a while; None: no such video."""
        deadline = time.monotonic() + wait_s
        while True:
            watch = self._watches[video_id]
            watch.readers[reader], watch.had_reader = time.monotonic(), True
            news = watch.news  # taken before looking, so that no chunk can slip in between
            found = await self._run(self._find, video_id, chunk)
            if found is None:
                self._watches.pop(video_id, None)
                return None
            watch.over = found.status.over
            left_s = deadline - time.monotonic()
            if found.data is not None or watch.over or left_s <= 0:
                return found
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), left_s)

    async def leave(self, video_id: str, reader: str) -> None:
        """A reader is gone."""
        watch = self._watches.get(video_id)
        if watch is not None:
            watch.readers.pop(reader, None)
            if watch.over and not watch.readers:
                del self._watches[video_id]

    async def content(self, video_id: str, start: int, stop: int) -> tuple[int, bytes] | None:
        """Size of the finished file and some of its bytes; None when it is not there."""
        return await self._run(_read_part, self._files.path(video_id), start, stop)

    async def add_interaction(self, video_id: str, change: Interaction) -> Interaction | None:
        """Note a prompt change; returns the one known by this event id, None when it is new."""
        return await self._run(self._database.add_interaction, video_id, change)

    async def remove_interaction(self, video_id: str, event_id: str) -> None:
        await self._run(self._database.remove_interaction, video_id, event_id)

    async def ready(self) -> bool:
        """The database answers; an error says that it does not."""
        await self._run(self._database.newest, 1, None, False)
        return True

    async def _run(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments, **named))

    async def _finish(
        self, video_id: str, status: Status, code: str | None = None, message: str | None = None
    ) -> bool:
        ended = await self._run(self._database.finish, video_id, status, time.time(), code, message)
        if ended:
            _LOG.info("video %s is %s%s", video_id, status.value, f": {code}" if code else "")
        self._tell(video_id, over=True)
        return ended

    def _find(self, video_id: str, chunk: int) -> Segment | None:
        video = self._database.get(video_id)
        if video is None:
            return None
        orphan = self._is_orphan(video_id, video.status)
        if chunk < 0:
            return Segment(video.status, self._files.read(video_id, _INIT), 0, orphan)
        if chunk >= video.chunks_done:
            return Segment(video.status, None, 0, orphan)
        frames = self._database.chunk_frames(video_id, chunk) or 0
        return Segment(video.status, self._files.read(video_id, str(chunk)), frames, orphan)

    def _is_orphan(self, video_id: str, status: Status) -> bool:
        watch = self._watches.get(video_id, _Watch())
        return not status.over and time.monotonic() - watch.driven_at > self._driver_silence_s

    def _count_readers(self, watch: _Watch) -> int:
        now = time.monotonic()
        watch.readers = {name: at for name, at in watch.readers.items() if now - at < self._reader_silence_s}
        return len(watch.readers)

    def _tell(self, video_id: str, over: bool = False) -> None:
        watch = self._watches[video_id]
        watch.news.set()
        watch.news = asyncio.Event()
        if over and not watch.readers:
            del self._watches[video_id]


def _read_part(path: Path, start: int, stop: int) -> tuple[int, bytes] | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(start)
        return size, file.read(max(0, min(stop, size) - start))


