"""Makes the finished file of each video whose chunks are all there, signed where that is asked for."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from concurrent.futures import Executor
from typing import NamedTuple

from diagonal.storage import StorageError
from serve.provenance.content_credentials import ContentCredentials, SigningError
from serve.records import Status
from serve.settings import ServeSettings
from serve.store.database import Database
from serve.store.media_files import INIT, MediaFiles

_LOG = logging.getLogger("ray.serve")
_SIGNING_TRIES = 3


class Outcome(NamedTuple):
    """How a video ends."""

    status: Status
    code: str | None = None
    message: str | None = None


class FileFinalizer:
    """One of the store's parts; what takes long runs on `executor`."""

    def __init__(self, settings: ServeSettings, database: Database, files: MediaFiles, executor: Executor) -> None:
        signed_with = (settings.c2pa_certificate, settings.c2pa_key)
        self._credentials = ContentCredentials.from_files(*signed_with) if all(signed_with) else None
        self._database, self._files, self._executor = database, files, executor
        self._failures: defaultdict[str, int] = defaultdict(int)

    @property
    def signs(self) -> bool:
        """Whether finished files carry content credentials."""
        return self._credentials is not None

    async def make(self, video_id: str) -> Outcome | None:
        """Make the file of a video whose chunks are all there: how the video ends, None when it does not yet."""
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._executor, self._make, video_id)
        except SigningError as error:
            return self._not_signed(video_id, error)
        except (StorageError, OSError) as error:  # the upkeep tries again
            _LOG.error("video %s: its file waits for the storage: %s", video_id, error)
            return None
        self._failures.pop(video_id, None)
        return Outcome(Status.COMPLETED) if made else None

    def _make(self, video_id: str) -> bool:
        """Whether the video is still there."""
        video = self._database.get(video_id)
        if video is None:
            return False
        seal = None if self._credentials is None else self._credentials.seal(video)
        self._files.join(video_id, [INIT, *self._database.chunk_files(video_id)], seal)
        return True

    def _not_signed(self, video_id: str, error: SigningError) -> Outcome | None:
        """The upkeep tries again, a few times; a file that should be signed is never given out without."""
        self._failures[video_id] += 1
        _LOG.error("video %s: its file could not be signed: %s", video_id, error)
        if self._failures[video_id] < _SIGNING_TRIES:
            return None
        del self._failures[video_id]
        return Outcome(Status.FAILED, "signing_failed", "the finished file could not be signed")
