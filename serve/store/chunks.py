"""The chunks of a video on the disk and in the database: how they come there, and what a reader gets of them.

Everything here waits for the disk: the store calls it on its one thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from diagonal.chain import Link, public_key_of, signed_link
from serve.records import LIVE, ChunkEvents, EncodedChunk, KeptChunk, PutChunks, Segment, Status, VideoRecord
from serve.store.database import Database
from serve.store.media_files import INIT, MediaFiles

_CHUNKS_A_READ, _BYTES_A_READ = 8, 1 << 20


class ChunkStore:
    """A chunk counts when its bytes, and the snapshot behind it, are on the disk and its link is signed."""

    def __init__(self, database: Database, files: MediaFiles, signer: ChunkSigner) -> None:
        self._database, self._files, self._signer = database, files, signer

    def keep(self, request: PutChunks, now: float) -> bool:
        """Put chunks and the newest's snapshot on the disk, then into the database; whether they were the next ones."""
        video_id, epoch, chunks, snapshot = request.video_id, request.epoch, request.chunks, request.snapshot
        links = self._signer.links(video_id, chunks)
        kept = [KeptChunk(chunk, f"{chunk.chunk}-{epoch}", link) for chunk, link in zip(chunks, links, strict=True)]
        files = {one.file: one.chunk.data for one in kept}
        if snapshot:
            kept[-1] = replace(kept[-1], snapshot=f"snapshot-{kept[-1].file}", whole_snapshot=request.whole_snapshot)
            files[kept[-1].snapshot] = snapshot
        self._files.put(video_id, files)
        return self._database.add_chunks(video_id, epoch, kept, now)

    def find(self, video: VideoRecord, chunk: int, reader: str, orphan: bool) -> Segment | None:
        """What a reader is told who wants that chunk (-1 is the initialisation segment); None: the video is gone."""
        superseded = reader.startswith(LIVE) and reader != LIVE + video.resume_hash
        news = Segment(video.status, orphan=orphan, superseded=superseded, error_code=video.error_code)
        if chunk < 0 and video.status is not Status.QUEUED:
            return replace(news, data=self._files.read(video.id, INIT))
        made = [] if chunk < 0 else self._database.chunks(video.id, chunk, 1 if video.live else _CHUNKS_A_READ)
        if superseded or not made:
            return replace(news, gone=0 <= chunk < video.chunks_done)
        events = self._database.events_at(video.id, chunk) if reader.startswith(LIVE) else ChunkEvents()
        try:
            parts, size = list[Segment](), 0
            while len(parts) < len(made) and size < _BYTES_A_READ:
                frames, file, link = made[len(parts)]
                data = self._files.read(video.id, file)
                parts.append(replace(news, data=data, frames=frames, link=link, events=events))
                size += len(data)
            return replace(parts[0], following=tuple(parts[1:]))
        except FileNotFoundError:
            if self._database.get(video.id) is None:
                return None  # deleted in between
            if video.endless:
                return replace(news, gone=True)
            raise


class ChunkSigner:
    """Makes the link of each chunk, on the one before it that the database holds: so the chain outlives the process."""

    def __init__(self, key: Ed25519PrivateKey, database: Database, files: MediaFiles) -> None:
        self._key, self._database, self._files = key, database, files
        self.public_key = public_key_of(key)

    def links(self, video_id: str, chunks: Sequence[EncodedChunk]) -> list[Link]:
        """The links of a video's next chunks, in order."""
        previous, made = self._previous(video_id, chunks[0].chunk), list[Link]()
        for chunk in chunks:
            sha256 = hashlib.sha256(chunk.data).hexdigest()
            made.append(signed_link(self._key, video_id, chunk.chunk, sha256, previous, chunk.last))
            previous = made[-1].signature
        return made

    def _previous(self, video_id: str, chunk: int) -> str:
        if chunk == 0:
            return hashlib.sha256(self._files.read(video_id, INIT)).hexdigest()
        before = self._database.links(video_id, chunk - 1, 1)
        return before[0].signature if before and before[0].chunk == chunk - 1 else ""
