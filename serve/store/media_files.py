"""Where media lies: chunks in a local folder a video; finished files there too, and on S3 when that is configured."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from diagonal.files import sync
from diagonal.media.encode import write_fragments
from diagonal.storage import Folder
from diagonal.storage.disk import Disk
from serve.provenance.content_credentials import Seal

INIT = "init"
FINISHED = "video.mp4"
RECORDING = "recording.json"


class MediaFiles:
    """A folder a video; every file is there whole or not at all, and on the disk before it counts.

    `durable` keeps the finished files where the local disk does not; what lies here is then a copy.
    """

    def __init__(self, root: Path, durable: Folder | None = None) -> None:
        self._root, self._durable = root, durable

    def put(self, video_id: str, files: Mapping[str, bytes]) -> None:
        """Some files at once; they are on the disk when this ends."""
        Disk(self._root / video_id).write_all(files)

    def read(self, video_id: str, name: str) -> bytes:
        return (self._root / video_id / name).read_bytes()

    def drop(self, video_id: str, names: Iterable[str]) -> None:
        """Remove files that are needed no more."""
        for name in names:
            (self._root / video_id / name).unlink(missing_ok=True)

    def join(self, video_id: str, names: Iterable[str], seal: Seal | None = None) -> None:
        """Make the finished file of the named segments, in order, and bring it to the durable storage.

        With `seal` no file counts without it. `StorageError` when the storage does not take it; a second call tries
        again.
        """
        path = self._root / video_id / FINISHED
        if seal is not None and path.is_file() and not seal.is_on(path):
            path.unlink()  # it was made when none was asked for
        if not path.is_file():
            segments = (self.read(video_id, name) for name in names)
            if seal is None:
                write_fragments(path, segments)
            else:
                self._write_sealed(path, segments, seal)
            sync(path)
            sync(path.parent)
        if self._durable is not None:
            (self._durable / video_id).put(path, FINISHED)

    def _write_sealed(self, path: Path, segments: Iterable[bytes], seal: Seal) -> None:
        """Nothing has the file's name before it is sealed and on the disk."""
        plain, sealed = (path.with_name(f".{path.name}.{kind}") for kind in ("plain", "sealed"))
        try:
            write_fragments(plain, segments)
            seal.write(plain, sealed)
            sync(sealed)
            os.replace(sealed, path)
        finally:
            plain.unlink(missing_ok=True)
            sealed.unlink(missing_ok=True)

    def find(self, video_id: str) -> Path | None:
        """The finished file on the local disk, fetched if it is elsewhere; None when there is none.

        `StorageError` when the durable storage does not answer.
        """
        path = self._root / video_id / FINISHED
        if not path.is_file():
            kept = None if self._durable is None else self._durable / video_id
            if kept is None or not kept.has(FINISHED):
                return None
            kept.get(FINISHED, path)
        return path

    def remove(self, video_id: str) -> None:
        shutil.rmtree(self._root / video_id, ignore_errors=True)
        if self._durable is not None:
            (self._durable / video_id).delete()

    def folders(self, older_than_s: float) -> list[str]:
        """Videos that have had files here for so long."""
        if not self._root.is_dir():
            return []
        latest = time.time() - older_than_s
        return [folder.name for folder in self._root.iterdir() if folder.is_dir() and folder.stat().st_mtime < latest]


def read_part(path: Path, start: int, stop: int) -> tuple[int, bytes]:
    """Size of a file and some of its bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(start)
        return size, file.read(max(0, min(stop, size) - start))
