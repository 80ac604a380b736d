"""The store: every video with its chunks, its interactions and its file, and the keys of who may ask for them.

Gateways keep nothing that matters. Chunks lie in files until the last one is there; then they become one plain MP4.
Who waits for a chunk is told when it comes. Who drives a video (pulls its chunks from the replica) shows so by asking;
one that falls silent is replaced. What a call acknowledged is on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from diagonal.chain import Link
from diagonal.storage import Folder, StorageError
from serve.provenance.signing_key import signing_key
from serve.records import (
    KEPT_CHUNKS,
    LOCAL,
    LOCAL_CALLER,
    Caller,
    DriveDecision,
    Guest,
    Idempotency,
    Interaction,
    Provenance,
    PutChunks,
    Refused,
    Role,
    Segment,
    Status,
    Usage,
    VideoRecord,
    Viewer,
)
from serve.settings import ServeSettings
from serve.store.chunks import ChunkSigner, ChunkStore
from serve.store.connection import LATE_S
from serve.store.credentials import Credentials, local_key
from serve.store.database import Database
from serve.store.finalizer import FileFinalizer
from serve.store.media_files import INIT, RECORDING, MediaFiles, read_part
from serve.store.presence import Presence
from serve.store.quotas import Quotas
from serve.store.tables import Tables
from serve.store.viewers import Viewers
from serve.tokens import Secret

P = ParamSpec("P")
T = TypeVar("T")
W = TypeVar("W", Segment, VideoRecord)
_LOG = logging.getLogger("ray.serve")
_STORAGE_PATIENCE_S = 30.0
_FILE_WAIT_S = 5.0
_STRAY_S = 3600.0
_LOOK_AGAIN_S = 1.0  # while one store follows another, the chunk may come to that one
_SALT_BYTES = 16
_TRIM_EVERY = 8
_MAX_PENDING = 64  # as `serve.wire.schemas` publishes it


class Store:
    """One of them serves all gateways. Times that decide something do not follow the machine's clock when it jumps."""

    def __init__(
        self,
        settings: ServeSettings,
        *,
        driver_silence_s: float = 2.5,  # three of a driver's beats: one that was only slow is superseded, no harm
        reader_silence_s: float = 15.0,
        sweep_s: float = 5.0,
    ) -> None:
        root = Path(settings.data).expanduser().resolve()
        root.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._tables = Tables(settings.database_url, wait_s=LATE_S)
        self._database, self._quotas = Database(self._tables), Quotas(self._tables)
        self._credentials, self._viewers = Credentials(self._tables), Viewers(self._tables)
        self._local = local_key(settings.local_key) if settings.auth == "local" else None
        durable = Folder(settings.files, _STORAGE_PATIENCE_S) if settings.files else None
        self._files = MediaFiles(root / "videos", durable)
        self._signer = ChunkSigner(signing_key(settings.signing_key, root), self._database, self._files)
        self._chunks = ChunkStore(self._database, self._files, self._signer)
        self._driver_silence_s, self._reader_silence_s = driver_silence_s, reader_silence_s
        self._presences: defaultdict[str, Presence] = defaultdict(Presence)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")  # one writer, and the loop stays free
        self._slow = ThreadPoolExecutor(2, thread_name_prefix="store-files")
        self._finalizer = FileFinalizer(settings, self._database, self._files, self._slow)
        self._completions: dict[str, asyncio.Task[None]] = {}
        self._zero_s = time.time() - time.monotonic()
        self._started_at = time.monotonic()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep_for_ever(sweep_s))

    # Videos

    async def admit(
        self, video: VideoRecord, caller: Caller, idempotency: Idempotency | None
    ) -> VideoRecord | Refused | None:
        """Keep a new video, which no replica holds yet; or the one that this request made before, or why not."""
        self._presences[video.id].driven_at = time.monotonic()
        video = replace(video, prompt_salt=secrets.token_hex(_SALT_BYTES), created_at=self._now())
        known = await self._run(self._quotas.admit, video, caller, idempotency, self._now())
        if known is not None:
            self._presences.pop(video.id, None)
        return known

    async def opened(self, video_id: str, replica: str, mime: str, init: bytes) -> bool:
        """A replica holds the session, whose stream begins with `init`; the caller drives it. False: it is gone."""
        self._presences[video_id].driven_at = time.monotonic()
        await self._run(self._files.put, video_id, {INIT: init})
        return await self._run(self._database.opened, video_id, replica, mime)

    async def usage(self, caller: Caller) -> Usage:
        """What the caller's account used of its quotas."""
        return await self._run(self._quotas.usage, caller, self._now())

    async def withdraw(self, video: VideoRecord, caller: Caller) -> None:
        """No replica took an admitted video: it never was."""
        await self._run(self._quotas.withdraw, video, caller)
        self._notify(video.id, over=True)

    async def get(self, video_id: str) -> VideoRecord | None:
        """The video, None when there is none."""
        video = await self._run(self._database.get, video_id)
        if video is None:
            return None
        return replace(video, orphan=self._is_orphan(video), age_s=max(0.0, self._now() - video.created_at))

    async def newest(
        self, owner: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> list[VideoRecord]:
        return await self._run(self._database.newest, owner, limit, after, ascending)

    async def delete(self, video_id: str, owner: str) -> VideoRecord | None:
        """Cancel the owner's video if it is not over, and remove it; returns what it was."""
        video = await self._run(self._database.remove, video_id, owner)
        if video is not None:
            self._notify(video_id, over=True)
            await self._remove_files(video_id)
        return video

    # Driving

    async def claim(self, video_id: str, replica: str, epoch: int) -> VideoRecord | None:
        """Become the driver of a session that `replica` holds: the video as it is now. None: another was faster."""
        if not await self._run(self._database.claim, video_id, replica, epoch):
            return None
        self._presences[video_id].driven_at = time.monotonic()
        return await self._run(self._database.get, video_id)

    async def release(self, video_id: str, epoch: int) -> None:
        """A driver lets go of its video: another one may take it at once, and is given as much time as any other."""
        video = await self._run(self._database.get, video_id)
        if video is not None and video.epoch == epoch and video_id in self._presences:
            presence = self._presences[video_id]
            presence.driven_at = min(presence.driven_at, time.monotonic() - self._driver_silence_s)

    async def orphans(self) -> list[VideoRecord]:
        """The videos that nobody drives, though chunks are missing."""
        found = await self._run(self._database.under_way)
        return [replace(video, orphan=True) for video in found if self._is_orphan(video) and not video.whole]

    async def check(self, video_id: str, epoch: int) -> DriveDecision:
        """A driver asks whether to make the next chunk."""
        video = await self._run(self._database.get, video_id)
        if video is None or video.status.over or video.epoch != epoch:
            return DriveDecision(go=False, superseded=video is not None and video.epoch != epoch)
        if video.endless and video.frames_done >= self._settings.max_stream_s * video.fps:
            await self.end(video_id, Status.COMPLETED)
            return DriveDecision(go=False)
        presence = self._presences[video_id]
        presence.driven_at = time.monotonic()
        presence.forget_silent(self._reader_silence_s, self._settings.resume_window_s)
        return presence.decision(video.paused)

    async def put_chunks(self, request: PutChunks) -> DriveDecision | None:
        """Keep the next chunks and hand them to whoever waits; with the last the file is made. None: not wanted.

        Else it says what `check` would: a driver need not ask again. The names of files hold the epoch: a driver that
        was replaced can never change a chunk that was served.
        """
        video_id, chunks = request.video_id, request.chunks
        decision = await self.check(video_id, request.epoch)
        if not decision.go or not await self._run(self._keep, request):
            return None
        self._notify(video_id)
        newest = chunks[-1]
        if newest.chunk >= KEPT_CHUNKS and any(chunk.chunk % _TRIM_EVERY == 0 for chunk in chunks):
            await self._trim_endless(video_id, newest.chunk + 1 - KEPT_CHUNKS)
        if newest.last:
            await self.complete(video_id)  # at its end all snapshots go: not before, who waits for the chunk is first
        elif request.whole_snapshot:
            await self._drop_snapshots(video_id, newest.chunk)
        return decision

    async def snapshots(self, video_id: str) -> list[bytes]:
        """What a replica needs to go on after the newest chunk that it can go on from, oldest part first."""
        names = await self._run(self._database.snapshots, video_id)
        return [await self._run(self._files.read, video_id, name) for name in names]

    async def complete(self, video_id: str) -> None:
        """Make the file of a video whose chunks are all there; waits a while for it."""
        task = self._completions.get(video_id)
        if task is None:
            task = self._completions[video_id] = asyncio.get_running_loop().create_task(self._complete(video_id))
            task.add_done_callback(lambda _: self._completions.pop(video_id, None))
        await asyncio.wait({task}, timeout=_FILE_WAIT_S)

    async def _complete(self, video_id: str) -> None:
        if outcome := await self._finalizer.make(video_id):
            await self.end(video_id, *outcome)

    async def provenance(self) -> Provenance:
        """What tells where a video came from."""
        return Provenance(self._signer.public_key, self._finalizer.signs, self._settings.watermark)

    async def chunk_frames(self, video_id: str, start_chunk: int) -> list[int]:
        """Pixel frames of each chunk that is there, from `start_chunk` on."""
        return await self._run(self._database.chunk_frames, video_id, start_chunk)

    async def links(self, video_id: str, start_chunk: int, limit: int) -> list[Link]:
        """The signed chain of a stream's chunks, as far as it is made and kept."""
        return await self._run(self._database.links, video_id, start_chunk, limit)

    async def end(self, video_id: str, status: Status, code: str | None = None, message: str | None = None) -> bool:
        """A video ends before its last chunk; False when it was over."""
        expires_at = self._now() + self._settings.retention_s
        ended = await self._run(
            self._database.finish, video_id, status, self._now(), code, message, expires_at=expires_at
        )
        if ended:
            _LOG.info("video %s is %s%s", video_id, status.value, f": {code}" if code else "")
        if ended:
            await self._drop_snapshots(video_id, before=2**31 - 1)
        self._notify(video_id, over=True)
        return ended

    # Reading

    async def segment(self, video_id: str, reader: str, chunk: int, wait_s: float) -> Segment | None:
        """The bytes of a chunk (-1 is the initialisation segment), waiting for it a while; None: no such video.

        Of a video that nobody paces, the chunks behind it that are there come along.
        """
        look = partial(self._find, video_id, chunk, reader)
        return await self._look_until(look, lambda found: found.final, video_id, reader, wait_s)

    async def awaited(self, video_id: str, reader: str, chunk: int, wait_s: float) -> VideoRecord | None:
        """The video, as soon as that chunk is there or it is over, at the latest after a while; None: no such video.

        Whoever waits so reads the video, as with `segment`, but gets no bytes.
        """

        def there(video: VideoRecord) -> bool:
            return video.status.over or video.chunks_done > chunk

        look = partial(self._database.get, video_id)
        video = await self._look_until(look, there, video_id, reader, wait_s)
        return None if video is None else replace(video, orphan=self._is_orphan(video))

    async def _look_until(
        self, look: Callable[[], W | None], done: Callable[[W], bool], video_id: str, reader: str, wait_s: float
    ) -> W | None:
        """What `look` finds, as soon as it is `done` or the time is up; it looks again when there is news."""
        deadline = time.monotonic() + wait_s
        while True:
            presence = self._presences[video_id]
            presence.saw_reader(reader)
            news = presence.news  # taken before looking, so that no chunk can slip in between
            found = await self._run(look)
            if found is None:
                self._presences.pop(video_id, None)
                return None
            presence.over = found.status.over
            left_s = deadline - time.monotonic()
            if done(found) or left_s <= 0:
                return found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _LOOK_AGAIN_S)):
                    await news.wait()

    async def playback(self, video_id: str, reader: str, position_s: float, window_s: float) -> None:
        """A reader tells how far it has played, and how much media it wants ahead."""
        if video_id in self._presences:
            self._presences[video_id].report_position(reader, position_s, window_s)

    async def leave(self, video_id: str, reader: str, return_s: float = 0.0) -> None:
        """A reader is gone; it may come back within `return_s`."""
        presence = self._presences.get(video_id)
        if presence is not None:
            presence.readers.pop(reader, None)
            presence.return_by = time.monotonic() + return_s
            if presence.over and not presence.readers:
                del self._presences[video_id]

    async def take_over(self, owner: str, old_hash: str, new_hash: str) -> VideoRecord | None:
        """Who shows a resume token becomes the session's only reader, with a new token; None: it does not count."""
        video = await self._run(self._database.take_over, owner, old_hash, new_hash)
        if video is not None:
            self._notify(video.id)
        return video

    async def content(self, video_id: str, start: int, stop: int) -> tuple[int, bytes] | None:
        """Size of the finished file and some of its bytes; None when it is not there."""
        path = await self._apart(self._files.find, video_id)
        return None if path is None else await self._run(read_part, path, start, stop)

    async def put_recording(self, video_id: str, text: str) -> None:
        """Keep the log of a session until its video is removed; it holds prompts."""
        if await self._run(self._database.get, video_id) is not None:
            await self._run(self._files.put, video_id, {RECORDING: text.encode()})

    async def recording(self, video_id: str) -> str | None:
        """The log of a session, None when none was kept."""
        with contextlib.suppress(FileNotFoundError):
            return (await self._run(self._files.read, video_id, RECORDING)).decode()
        return None

    # Interactions

    async def add_interaction(self, video_id: str, change: Interaction) -> Interaction | bool:
        """Note an interaction; the one known by this event id, else whether there was room for it."""
        return await self._run(self._database.add_interaction, video_id, change, _MAX_PENDING)

    async def set_paused(self, video_id: str, event_id: str, paused: bool) -> bool:
        """A session is paused or goes on, as that interaction asked; False: it is over."""
        return await self._run(self._database.set_paused, video_id, event_id, paused)

    async def remove_interaction(self, video_id: str, event_id: str) -> None:
        await self._run(self._database.remove_interaction, video_id, event_id)

    # Keys

    async def caller(self, shown: Secret) -> Caller | None:
        """Whose key this is."""
        if shown.id == LOCAL:
            return LOCAL_CALLER if self._local is not None and compare_digest(shown.hash, self._local.hash) else None
        return await self._run(self._credentials.caller, shown)

    async def create_client_secret(self, key_id: str, seconds: float) -> tuple[str, float]:
        """A secret that opens one session in the key's name, and when it ends."""
        expires_at = self._now() + seconds
        return await self._run(self._credentials.create_client_secret, key_id, expires_at), expires_at

    async def redeem(self, shown: Secret) -> Caller | None:
        """Use a client secret up: who made it."""
        key_id = await self._run(self._credentials.redeem, shown, self._now())
        return None if key_id is None else await self._caller_of(key_id)

    async def _caller_of(self, key_id: str) -> Caller | None:
        """The caller of a key that counts still."""
        if key_id == LOCAL:
            return LOCAL_CALLER if self._local is not None else None
        return await self._run(self._credentials.caller_of, key_id)

    # Viewers

    async def add_viewer(self, video_id: str, role: Role, name: str, seconds: float) -> tuple[str, Viewer] | None:
        """A new viewer's token, told this once, and the viewer; None where a video has as many as it may."""
        return await self._run(self._viewers.add, video_id, role, name, self._now(), seconds)

    async def viewers(self, video_id: str) -> list[Viewer]:
        """Whom a video's owner gave a token that counts still, the oldest first."""
        return await self._run(self._viewers.of, video_id, self._now())

    async def revoke_viewer(self, video_id: str, viewer_id: str) -> bool:
        """End a viewer's token; False where the video has no such viewer."""
        return await self._run(self._viewers.revoke, video_id, viewer_id)

    async def guest(self, shown: Secret) -> Guest | None:
        """Whose token this is; None where it does not count (any more), or the owner's key does not."""
        now = self._now()
        found = await self._run(self._viewers.find, shown, now)
        owner = None if found is None else await self._caller_of(found[1])
        return None if found is None or owner is None else Guest(found[0], owner, found[0].expires_at - now)

    # Upkeep

    async def ready(self) -> bool:
        """The database answers; an error says that it does not."""
        await self._run(self._database.known, [])
        return True

    async def shut(self) -> None:
        """End the upkeep and the connections (tests; Serve ends the process)."""
        self._sweeper.cancel()
        await asyncio.gather(self._sweeper, *self._completions.values(), return_exceptions=True)
        self._thread.shutdown()
        self._slow.shutdown()
        self._tables.close()

    async def sweep(self) -> None:
        """One round of upkeep: what was left half done, what nobody drives, what is past its time."""
        for video in await self._run(self._database.under_way):
            if video.whole:
                await self.complete(video.id)
            elif self._is_lost(video):
                await self.end(video.id, Status.FAILED, "session_lost", "the session was lost")
        for video_id in await self._run(self._database.disowned):
            await self.end(video_id, Status.CANCELLED, "key_revoked", "the key that it was made with was revoked")
        for video_id in await self._run(self._database.expired, self._now()):
            await self._run(self._database.remove, video_id)
            self._notify(video_id, over=True)
            await self._remove_files(video_id)
        await self._run(self._quotas.prune, self._now())
        await self._run(self._credentials.prune, self._now())
        await self._run(self._viewers.prune, self._now())

    async def _sweep_for_ever(self, every_s: float) -> None:
        while True:
            try:
                await self._remove_strays()
                await self.sweep()
            except (SQLAlchemyError, OSError, StorageError) as error:  # the next round tries again
                _LOG.error("upkeep of the store: %s", type(error).__name__)
            await asyncio.sleep(every_s)

    async def _remove_strays(self) -> None:
        """Files of videos that the database does not know: a crash came between the two."""
        found = await self._run(self._files.folders, _STRAY_S)
        known = await self._run(self._database.known, found)
        for video_id in set(found) - known:
            await self._remove_files(video_id)

    async def _trim_endless(self, video_id: str, before: int) -> None:
        """Of a stream without an end the newest chunks alone are kept."""
        video = await self._run(self._database.get, video_id)
        if video is not None and video.endless:
            names = await self._run(self._database.forget_chunks, video_id, before)
            await self._run(self._files.drop, video_id, names)

    async def _drop_snapshots(self, video_id: str, before: int) -> None:
        names = await self._run(self._database.forget_snapshots, video_id, before)
        await self._run(self._files.drop, video_id, names)

    async def _remove_files(self, video_id: str) -> None:
        try:
            await self._apart(self._files.remove, video_id)
        except (StorageError, OSError) as error:
            _LOG.error("video %s: its file could not be removed: %s", video_id, error)

    async def _run(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments, **named))

    async def _apart(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """What may take long does not hold up the chunks."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, lambda: function(*arguments, **named))

    def _now(self) -> float:
        """Seconds since 1970, by the clock's reading when this process began."""
        return self._zero_s + time.monotonic()

    def _keep(self, request: PutChunks) -> bool:
        return self._chunks.keep(request, self._now())

    def _find(self, video_id: str, chunk: int, reader: str) -> Segment | None:
        video = self._database.get(video_id)
        return None if video is None else self._chunks.find(video, chunk, reader, self._is_orphan(video))

    def _silence_s(self, video: VideoRecord) -> float:
        """How long nobody has driven the video; after a restart, since that."""
        presence = self._presences.get(video.id, Presence())
        return time.monotonic() - max(presence.driven_at, self._started_at)

    def _is_orphan(self, video: VideoRecord) -> bool:
        held = not video.status.over and video.status is not Status.QUEUED
        return held and self._silence_s(video) > self._driver_silence_s

    def _is_lost(self, video: VideoRecord) -> bool:
        """Nobody drives it, and its replica has let the session go by now."""
        return self._silence_s(video) > self._driver_silence_s + self._settings.session_idle_timeout_s

    def _notify(self, video_id: str, over: bool = False) -> None:
        presence = self._presences[video_id]
        presence.notify()
        if over and not presence.readers:
            del self._presences[video_id]
