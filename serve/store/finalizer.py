"""Makes the finished file of each video whose chunks are all there, signed where that is asked for."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

from diagonal.storage import StorageError
from serve.provenance.content_credentials import ContentCredentials, SigningError
from serve.records import Status
from serve.settings import ServeSettings
from serve.store.database import Database
from serve.store.media_files import INIT, MediaFiles

_LOG = logging.getLogger("ray.serve")
_WAIT_S = 5.0
_SIGNING_TRIES = 3


class Finisher:
    """One of the store's parts; what takes long runs on `executor`. `end` is how a video ends."""

    def __init__(
        self,
        settings: ServeSettings,
        database: Database,
        files: MediaFiles,
        executor: Executor,
        end: Callable[..., Awaitable[Any]],
    ) -> None:
        signed_with = (settings.c2pa_certificate, settings.c2pa_key)
        self._credentials = ContentCredentials.from_files(*signed_with) if all(signed_with) else None
        self._database, self._files, self._executor, self._end = database, files, executor, end
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures: defaultdict[str, int] = defaultdict(int)

    @property
    def signs(self) -> bool:
        """Whether finished files carry content credentials."""
        return self._credentials is not None

    async def complete(self, video_id: str) -> None:
        """Make the file of a video whose chunks are all there; waits a while for it."""
        task = self._tasks.get(video_id)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._complete(video_id))
            self._tasks[video_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(video_id, None))
        await asyncio.wait({task}, timeout=_WAIT_S)

    async def shut(self) -> None:
        """Wait for what is being made."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _complete(self, video_id: str) -> None:
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._executor, self._make, video_id)
        except SigningError as error:
            return await self._not_signed(video_id, error)
        except (StorageError, OSError) as error:  # the upkeep tries again
            _LOG.error("video %s: its file waits for the storage: %s", video_id, error)
            return
        self._failures.pop(video_id, None)
        if made:
            await self._end(video_id, Status.COMPLETED)

    def _make(self, video_id: str) -> bool:
        """Whether the video is still there."""
        video = self._database.get(video_id)
        if video is None:
            return False
        seal = None if self._credentials is None else self._credentials.seal(video)
        self._files.join(video_id, [INIT, *self._database.chunk_files(video_id)], seal)
        return True

    async def _not_signed(self, video_id: str, error: SigningError) -> None:
        """The upkeep tries again, a few times; a file that should be signed is never given out without."""
        self._failures[video_id] += 1
        _LOG.error("video %s: its file could not be signed: %s", video_id, error)
        if self._failures[video_id] >= _SIGNING_TRIES:
            del self._failures[video_id]
            await self._end(video_id, Status.FAILED, "signing_failed", "the finished file could not be signed")
