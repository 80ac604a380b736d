"""Every statement on videos, their chunks and their interactions. Each public method is one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sql

from diagonal.chain import Link
from serve.records import ChunkEvents, Interaction, InteractionKind, KeptChunk, Pacing, Status, VideoRecord
from serve.store.tables import CHUNKS, IDEMPOTENCY, INTERACTIONS, KEYS, USAGE, VIDEOS, VIEWERS, Tables

_RUNNING = (Status.QUEUED.value, Status.IN_PROGRESS.value)
_FIRST_MINUTE_S = 60
KEPT_INTERACTIONS = 256  # every look at a video brings them along
_LONGEST_TRANSITION_CHUNKS = 64  # as `serve.wire.schemas` publishes it

# What is asked several times a chunk is put together once: that costs more than the answer.
_THIS: sql.BindParameter[str] = sql.bindparam("video_id")
_FROM: sql.BindParameter[int] = sql.bindparam("start")
_TO: sql.BindParameter[int] = sql.bindparam("stop")
_VIDEO = VIDEOS.select().where(VIDEOS.c.id == _THIS)
_INTERACTIONS = INTERACTIONS.select().where(INTERACTIONS.c.video_id == _THIS).order_by(INTERACTIONS.c.number)
_BETWEEN = CHUNKS.select().where(CHUNKS.c.video_id == _THIS, CHUNKS.c.chunk >= _FROM, CHUNKS.c.chunk < _TO)
_CHUNKS_BETWEEN = _BETWEEN.order_by(CHUNKS.c.chunk)


class Database:
    """Videos and all that belongs to them. Safe to use from several threads."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def get(self, video_id: str) -> VideoRecord | None:
        with self._tables.reading() as connection:
            row = connection.execute(_VIDEO, {"video_id": video_id}).mappings().first()
            if row is None:
                return None
            changes = connection.execute(_INTERACTIONS, {"video_id": video_id}).mappings()
            return replace(read_video(row), interactions=tuple(map(_interaction, changes)))

    def newest(self, owner: str, limit: int, after: str | None, ascending: bool) -> list[VideoRecord]:
        """At most `limit` of an owner's videos by age, those after the video `after`; without their interactions."""
        order = VIDEOS.c.number.asc() if ascending else VIDEOS.c.number.desc()
        query = VIDEOS.select().where(VIDEOS.c.owner == owner).order_by(order).limit(limit)
        if after is not None:
            mark = sql.select(VIDEOS.c.number).where(VIDEOS.c.id == after, VIDEOS.c.owner == owner).scalar_subquery()
            query = query.where(VIDEOS.c.number > mark if ascending else VIDEOS.c.number < mark)
        with self._tables.reading() as connection:
            return [read_video(row) for row in connection.execute(query).mappings()]

    def opened(self, video_id: str, replica: str, mime: str) -> bool:
        """A replica holds the session of a video that waited for one."""
        values = {"status": Status.IN_PROGRESS.value, "replica": replica, "mime": mime}
        return self._update(video_id, VIDEOS.c.status == Status.QUEUED.value, **values)

    def claim(self, video_id: str, replica: str, epoch: int) -> bool:
        """Become the driver, of a session that `replica` holds: the epoch moves on from `epoch`, for one caller."""
        return self._update(video_id, VIDEOS.c.epoch == epoch, epoch=epoch + 1, replica=replica)

    def add_chunks(self, video_id: str, epoch: int, kept: Sequence[KeptChunk], now: float) -> bool:
        """Note chunks whose files are there, if they are the next ones, in order, and come from the newest driver.

        The same chunks again, from who gave them before, are no harm: the answer may have been lost.
        """
        first, newest = kept[0].chunk, kept[-1].chunk
        next_one = (VIDEOS.c.epoch == epoch) & (VIDEOS.c.chunks_done == first.chunk)
        done = {"chunks_done": newest.chunk + 1, "frames_done": newest.first_pixel_frame + newest.frames}
        changed = running(video_id, next_one).values(**done)
        with self._tables.writing() as connection:
            video = connection.execute(changed.returning(VIDEOS.c.account, VIDEOS.c.fps, VIDEOS.c.pacing)).first()
            if video is None:
                mine = CHUNKS.c.file.in_([one.file for one in kept])
                same = sql.select(CHUNKS.c.chunk).where(CHUNKS.c.video_id == video_id, mine)
                return len(connection.execute(same).all()) == len(kept)
            connection.execute(CHUNKS.insert(), [_chunk_row(video_id, one) for one in kept])
            for chunk in (one.chunk for one in kept if one.chunk.applied_event_ids):
                applied = INTERACTIONS.c.event_id.in_(chunk.applied_event_ids)
                query = INTERACTIONS.update().where(INTERACTIONS.c.video_id == video_id, applied)
                connection.execute(query.values(chunk=chunk.chunk, pixel_frame=chunk.first_pixel_frame))
            # A stream was charged its first minute when it was admitted; what it makes after that, as it comes.
            beyond = done["frames_done"] - max(first.first_pixel_frame, _FIRST_MINUTE_S * video.fps)
            if video.pacing == Pacing.REALTIME.value and beyond > 0:
                connection.execute(USAGE.insert().values(account=video.account, at=now, frames=beyond))
            return True

    def chunks(self, video_id: str, chunk: int, limit: int) -> list[tuple[int, str, Link]]:
        """Pixel frames, file and link of that chunk and of those behind it that are there; none without it."""
        mine = {"video_id": video_id, "start": chunk, "stop": chunk + limit}
        with self._tables.reading() as connection:
            rows = connection.execute(_CHUNKS_BETWEEN, mine).mappings().all()
        return [(row["frames"], row["file"] or str(row["chunk"]), _link(row)) for row in rows]

    def chunk_frames(self, video_id: str, start_chunk: int) -> list[int]:
        """Pixel frames of each chunk that is there, from `start_chunk` on."""
        mine = (CHUNKS.c.video_id == video_id) & (CHUNKS.c.chunk >= start_chunk)
        with self._tables.reading() as connection:
            return list(connection.execute(sql.select(CHUNKS.c.frames).where(mine).order_by(CHUNKS.c.chunk)).scalars())

    def links(self, video_id: str, start_chunk: int, limit: int) -> list[Link]:
        """The chain's links of the chunks that are there, from `start_chunk` on, at most `limit`."""
        mine = (CHUNKS.c.video_id == video_id) & (CHUNKS.c.chunk >= start_chunk)
        with self._tables.reading() as connection:
            query = CHUNKS.select().where(mine).order_by(CHUNKS.c.chunk).limit(limit)
            return [_link(row) for row in connection.execute(query).mappings()]

    def events_at(self, video_id: str, chunk: int) -> ChunkEvents:
        """Which prompt changes began with that chunk, are still blending in it, and are done with it."""
        prompts = (INTERACTIONS.c.video_id == video_id) & (INTERACTIONS.c.kind == InteractionKind.PROMPT.value)
        query = INTERACTIONS.select().where(prompts, INTERACTIONS.c.chunk <= chunk).order_by(INTERACTIONS.c.number)
        with self._tables.reading() as connection:
            changes = [_interaction(row) for row in connection.execute(query).mappings()]
        return chunk_events(changes, chunk)

    def chunk_files(self, video_id: str) -> list[str]:
        """Names of the files of a video's chunks, in order."""
        query = sql.select(CHUNKS.c.chunk, CHUNKS.c.file).where(CHUNKS.c.video_id == video_id).order_by(CHUNKS.c.chunk)
        with self._tables.reading() as connection:
            return [row.file or str(row.chunk) for row in connection.execute(query)]

    def snapshots(self, video_id: str) -> list[str]:
        """Files of what a session goes on from: the newest whole snapshot, then what each later one adds to it.

        The chunks between two of them came with the second one.
        """
        columns = (CHUNKS.c.chunk, CHUNKS.c.snapshot, CHUNKS.c.whole_snapshot)
        mine = (CHUNKS.c.video_id == video_id) & (CHUNKS.c.snapshot != "")
        chain: list[str] = []
        with self._tables.reading() as connection:
            for row in connection.execute(sql.select(*columns).where(mine).order_by(CHUNKS.c.chunk)):
                if row.whole_snapshot:
                    chain = [row.snapshot]
                elif chain:
                    chain.append(row.snapshot)
        return chain

    def forget_snapshots(self, video_id: str, before: int) -> list[str]:
        """Snapshots of chunks before that one are needed no more: names of their files."""
        old = (CHUNKS.c.video_id == video_id) & (CHUNKS.c.chunk < before) & (CHUNKS.c.snapshot != "")
        with self._tables.writing() as connection:
            files = list(connection.execute(sql.select(CHUNKS.c.snapshot).where(old)).scalars())
            connection.execute(CHUNKS.update().where(old).values(snapshot="", whole_snapshot=False))
            return files

    def forget_chunks(self, video_id: str, before: int) -> list[str]:
        """An endless stream's chunks before that one are kept no longer: names of their files.

        Their links stay, so that a recording can be proved; prompt changes that are long done go with them.
        """
        old = (CHUNKS.c.video_id == video_id) & (CHUNKS.c.chunk < before) & (CHUNKS.c.file != "")
        done = (INTERACTIONS.c.video_id == video_id) & (INTERACTIONS.c.chunk < before - _LONGEST_TRANSITION_CHUNKS)
        with self._tables.writing() as connection:
            gone = connection.execute(sql.select(CHUNKS.c.file, CHUNKS.c.snapshot).where(old)).all()
            connection.execute(CHUNKS.update().where(old).values(file="", snapshot="", whole_snapshot=False))
            connection.execute(INTERACTIONS.delete().where(done))
        return [name for row in gone for name in row if name]

    def set_paused(self, video_id: str, event_id: str, paused: bool) -> bool:
        """A replica paused or resumed a session, as that interaction asked: it took effect at the next chunk."""
        with self._tables.writing() as connection:
            query = running(video_id).values(paused=paused).returning(VIDEOS.c.chunks_done, VIDEOS.c.frames_done)
            video = connection.execute(query).first()
            if video is None:
                return False
            mine = (INTERACTIONS.c.video_id == video_id) & (INTERACTIONS.c.event_id == event_id)
            place = {"chunk": video.chunks_done, "pixel_frame": video.frames_done}
            connection.execute(INTERACTIONS.update().where(mine).values(**place))
            return True

    def finish(
        self,
        video_id: str,
        status: Status,
        at: float,
        code: str | None = None,
        message: str | None = None,
        *,
        expires_at: float | None = None,
    ) -> bool:
        """End a video that is not over; False when it was, or is gone."""
        values = {"completed_at": at, "error_code": code, "error_message": message, "expires_at": expires_at}
        return self._update(video_id, status=status.value, **values)

    def add_interaction(self, video_id: str, change: Interaction, pending: int) -> Interaction | bool:
        """Note an interaction, once: the one that is there already by this event id, else whether there was room.

        At most `pending` may wait to take effect; of those that did, the newest `KEPT_INTERACTIONS` are kept.
        """
        mine = (INTERACTIONS.c.video_id == video_id) & (INTERACTIONS.c.event_id == change.event_id)
        waiting = (INTERACTIONS.c.video_id == video_id) & INTERACTIONS.c.chunk.is_(None)
        with self._tables.writing() as connection:
            connection.execute(sql.select(VIDEOS.c.id).where(VIDEOS.c.id == video_id).with_for_update())
            known = connection.execute(INTERACTIONS.select().where(mine)).mappings().first()
            if known is not None:
                return _interaction(known)
            count = connection.execute(sql.select(sql.func.count()).select_from(INTERACTIONS).where(waiting))
            if count.scalar_one() >= pending:
                return False
            connection.execute(INTERACTIONS.delete().where(INTERACTIONS.c.number.in_(_forgotten(video_id))))
            connection.execute(INTERACTIONS.insert().values(video_id=video_id, **vars(change)))
            return True

    def remove_interaction(self, video_id: str, event_id: str) -> None:
        """Take back an interaction that no replica took."""
        mine = (INTERACTIONS.c.video_id == video_id) & (INTERACTIONS.c.event_id == event_id)
        with self._tables.writing() as connection:
            connection.execute(INTERACTIONS.delete().where(mine))

    def take_over(self, owner: str, old_hash: str, new_hash: str) -> VideoRecord | None:
        """Replace the resume token that counts, for whoever of the owner's shows it; of several, one succeeds."""
        mine = (VIDEOS.c.resume_hash == old_hash) & (VIDEOS.c.owner == owner)
        with self._tables.writing() as connection:
            query = VIDEOS.update().where(mine).values(resume_hash=new_hash).returning(*VIDEOS.columns)
            row = connection.execute(query).mappings().first() if old_hash else None
            return None if row is None else read_video(row)

    def remove(self, video_id: str, owner: str | None = None) -> VideoRecord | None:
        """Forget a video and all that belongs to it; returns what it was. With `owner`, only if it is his."""
        mine = VIDEOS.c.id == video_id if owner is None else (VIDEOS.c.id == video_id) & (VIDEOS.c.owner == owner)
        with self._tables.writing() as connection:
            row = connection.execute(VIDEOS.select().where(mine).with_for_update()).mappings().first()
            if row is None:
                return None
            connection.execute(VIDEOS.delete().where(mine))
            for table in (CHUNKS, INTERACTIONS, IDEMPOTENCY, VIEWERS):
                connection.execute(table.delete().where(table.c.video_id == video_id))
            return read_video(row)

    def under_way(self) -> list[VideoRecord]:
        """Every video that is not over."""
        with self._tables.reading() as connection:
            found = connection.execute(VIDEOS.select().where(VIDEOS.c.status.in_(_RUNNING))).mappings()
            return [read_video(row) for row in found]

    def disowned(self) -> list[str]:
        """Videos that are not over, of keys that were revoked."""
        mine = (VIDEOS.c.owner == KEYS.c.id) & KEYS.c.revoked_at.is_not(None)
        query = sql.select(VIDEOS.c.id).join(KEYS, mine).where(VIDEOS.c.status.in_(_RUNNING))
        with self._tables.reading() as connection:
            return list(connection.execute(query).scalars())

    def expired(self, now: float, limit: int = 100) -> list[str]:
        """Videos that are over and past their time."""
        query = sql.select(VIDEOS.c.id).where(VIDEOS.c.expires_at <= now, VIDEOS.c.status.not_in(_RUNNING))
        with self._tables.reading() as connection:
            return list(connection.execute(query.limit(limit)).scalars())

    def known(self, video_ids: list[str]) -> set[str]:
        """Those of these videos that there are."""
        with self._tables.reading() as connection:
            return set(connection.execute(sql.select(VIDEOS.c.id).where(VIDEOS.c.id.in_(video_ids))).scalars())

    def _update(self, video_id: str, *conditions: Any, **values: Any) -> bool:
        with self._tables.writing() as connection:
            return bool(connection.execute(running(video_id, *conditions).values(**values)).rowcount)


def chunk_events(changes: Sequence[Interaction], chunk: int) -> ChunkEvents:
    """The part that applied changes, in order, have in a chunk: one blends until it is done or the next one begins."""
    started, active, completed = [], [], []
    followers: list[Interaction | None] = [*changes[1:], None]
    for change, following in zip(changes, followers, strict=False):
        first = change.chunk or 0
        last = first + max(1, change.transition_chunks) - 1
        if following is not None and following.chunk is not None:
            last = min(last, max(first, following.chunk - 1))
        if first == chunk:
            started.append(change.event_id)
        if first <= chunk <= last:
            active.append(change.event_id)
        if last == chunk:
            completed.append(change.event_id)
    return ChunkEvents(tuple(started), tuple(active), tuple(completed))


def running(video_id: str, *conditions: Any) -> sql.Update:
    """A change of a video that is not over."""
    return VIDEOS.update().where(VIDEOS.c.id == video_id, VIDEOS.c.status.in_(_RUNNING), *conditions)


def read_video(row: sql.RowMapping) -> VideoRecord:
    values = {name: value for name, value in row.items() if name != "number"}
    return VideoRecord(**values | {"status": Status(row["status"]), "pacing": Pacing(row["pacing"])})


def video_row(video: VideoRecord) -> dict[str, Any]:
    columns = {column.name for column in VIDEOS.columns} - {"number"}
    return {name: value for name, value in vars(video).items() if name in columns}


def _chunk_row(video_id: str, kept: KeptChunk) -> dict[str, Any]:
    of_chunk = {name: getattr(kept.chunk, name) for name in ("chunk", "frames", "first_pixel_frame")}
    of_link = {name: getattr(kept.link, name) for name in ("sha256", "last", "previous", "signature", "public_key")}
    state = {"snapshot": kept.snapshot, "whole_snapshot": kept.whole_snapshot}
    return {"video_id": video_id, "file": kept.file} | of_chunk | of_link | state


def _link(row: sql.RowMapping) -> Link:
    names = ("chunk", "sha256", "previous", "last", "signature", "public_key")
    return Link(**{name: row[name] for name in names})


def _interaction(row: sql.RowMapping) -> Interaction:
    names = ("event_id", "prompt", "transition_chunks", "chunk", "pixel_frame", "made_by")
    return Interaction(**{name: row[name] for name in names}, kind=InteractionKind(row["kind"]))


def _forgotten(video_id: str) -> sql.Select[tuple[int]]:
    """Applied interactions beyond those that are kept."""
    applied = (INTERACTIONS.c.video_id == video_id) & INTERACTIONS.c.chunk.is_not(None)
    newest = sql.select(INTERACTIONS.c.number).where(applied).order_by(INTERACTIONS.c.number.desc())
    return newest.offset(KEPT_INTERACTIONS)
