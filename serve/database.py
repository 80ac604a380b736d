"""The store's tables and every statement on them, through SQLAlchemy: SQLite by default, any database by URL.

Each public method is one transaction: it happens whole or not at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Column, Float, Integer, MetaData, String, Table, Text

from serve.records import EncodedChunk, Interaction, Pacing, Status, VideoRecord

_TABLES = MetaData()
_VIDEOS = Table(
    "videos",
    _TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), unique=True, nullable=False),
    Column("model", String(128), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("seed", sql.BigInteger, nullable=False),
    Column("frames", Integer, nullable=False),
    Column("fps", Integer, nullable=False),
    Column("scale", Integer, nullable=False),
    Column("size", String(32), nullable=False),
    Column("pacing", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("status", String(16), nullable=False),
    Column("replica", String(128), nullable=False),
    Column("mime", String(128), nullable=False),
    Column("chunks_done", Integer, nullable=False),
    Column("frames_done", Integer, nullable=False),
    Column("completed_at", Float),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("epoch", Integer, nullable=False),
)
_CHUNKS = Table(
    "chunks",
    _TABLES,
    Column("video_id", String(64), primary_key=True),
    Column("chunk", Integer, primary_key=True),
    Column("frames", Integer, nullable=False),
    Column("first_pixel_frame", Integer, nullable=False),
)
_INTERACTIONS = Table(
    "interactions",
    _TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("video_id", String(64), nullable=False, index=True),
    Column("event_id", String(128), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("transition_chunks", Integer, nullable=False),
    Column("chunk", Integer),
    Column("pixel_frame", Integer),
    sql.UniqueConstraint("video_id", "event_id"),
)
_RUNNING = (Status.QUEUED.value, Status.IN_PROGRESS.value)


class Database:
    """Videos, their chunks and their prompt changes. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self._engine = sql.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            sql.event.listen(self._engine, "connect", _tune_sqlite)
        _TABLES.create_all(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    def add(self, video: VideoRecord) -> None:
        columns = {column.name for column in _VIDEOS.columns} - {"number"}
        row = {name: value for name, value in vars(video).items() if name in columns}
        with self._engine.begin() as connection:
            connection.execute(_VIDEOS.insert().values(**row))

    def get(self, video_id: str) -> VideoRecord | None:
        with self._engine.connect() as connection:
            row = connection.execute(_VIDEOS.select().where(_VIDEOS.c.id == video_id)).mappings().first()
            return None if row is None else replace(_video(row), interactions=_interactions(connection, video_id))

    def newest(self, limit: int, after: str | None, ascending: bool) -> list[VideoRecord]:
        """At most `limit` videos by age, those that follow the video `after`; without their interactions."""
        order = _VIDEOS.c.number.asc() if ascending else _VIDEOS.c.number.desc()
        query = _VIDEOS.select().order_by(order).limit(limit)
        if after is not None:
            mark = sql.select(_VIDEOS.c.number).where(_VIDEOS.c.id == after).scalar_subquery()
            query = query.where(_VIDEOS.c.number > mark if ascending else _VIDEOS.c.number < mark)
        with self._engine.connect() as connection:
            return [_video(row) for row in connection.execute(query).mappings()]

    def claim(self, video_id: str, epoch: int) -> bool:
        """Become the driver: the epoch moves on from `epoch`, for exactly one caller."""
        return self._update(video_id, _VIDEOS.c.epoch == epoch, epoch=epoch + 1)

    def add_chunk(self, video_id: str, epoch: int, chunk: EncodedChunk) -> bool:
        """Note a chunk, if it is the next one and comes from the newest driver."""
        with self._engine.begin() as connection:
            next_one = (_VIDEOS.c.epoch == epoch) & (_VIDEOS.c.chunks_done == chunk.chunk)
            done = {"chunks_done": chunk.chunk + 1, "frames_done": chunk.first_pixel_frame + chunk.frames}
            if not connection.execute(_running(video_id, next_one).values(**done)).rowcount:
                return False
            place = {"chunk": chunk.chunk, "first_pixel_frame": chunk.first_pixel_frame}
            connection.execute(_CHUNKS.insert().values(video_id=video_id, frames=chunk.frames, **place))
            if chunk.applied_event_ids:
                applied = _INTERACTIONS.c.event_id.in_(chunk.applied_event_ids)
                query = _INTERACTIONS.update().where(_INTERACTIONS.c.video_id == video_id, applied)
                connection.execute(query.values(chunk=chunk.chunk, pixel_frame=chunk.first_pixel_frame))
            return True

    def chunk_frames(self, video_id: str, chunk: int) -> int | None:
        """Pixel frames of a chunk that is there."""
        query = sql.select(_CHUNKS.c.frames).where(_CHUNKS.c.video_id == video_id, _CHUNKS.c.chunk == chunk)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar()

    def finish(
        self, video_id: str, status: Status, at: float, code: str | None = None, message: str | None = None
    ) -> bool:
        """End a video that is not over; False when it was, or is gone."""
        return self._update(video_id, status=status, completed_at=at, error_code=code, error_message=message)

    def add_interaction(self, video_id: str, change: Interaction) -> Interaction | None:
        """Note a prompt change, once: returns the one that is there already under this event id, else None."""
        mine = (_INTERACTIONS.c.video_id == video_id) & (_INTERACTIONS.c.event_id == change.event_id)
        with self._engine.begin() as connection:
            known = connection.execute(_INTERACTIONS.select().where(mine)).mappings().first()
            if known is None:
                connection.execute(_INTERACTIONS.insert().values(video_id=video_id, **vars(change)))
                return None
            return _interaction(known)

    def remove_interaction(self, video_id: str, event_id: str) -> None:
        """Take back a prompt change that no replica took."""
        mine = (_INTERACTIONS.c.video_id == video_id) & (_INTERACTIONS.c.event_id == event_id)
        with self._engine.begin() as connection:
            connection.execute(_INTERACTIONS.delete().where(mine))

    def remove(self, video_id: str) -> None:
        """Forget a video and all that belongs to it."""
        with self._engine.begin() as connection:
            for table, column in ((_VIDEOS, "id"), (_CHUNKS, "video_id"), (_INTERACTIONS, "video_id")):
                connection.execute(table.delete().where(table.c[column] == video_id))

    def _update(self, video_id: str, *conditions: Any, **values: Any) -> bool:
        with self._engine.begin() as connection:
            return bool(connection.execute(_running(video_id, *conditions).values(**values)).rowcount)


def _running(video_id: str, *conditions: Any) -> sql.Update:
    return _VIDEOS.update().where(_VIDEOS.c.id == video_id, _VIDEOS.c.status.in_(_RUNNING), *conditions)


def _video(row: sql.RowMapping) -> VideoRecord:
    values = {name: value for name, value in row.items() if name != "number"}
    return VideoRecord(**values | {"status": Status(row["status"]), "pacing": Pacing(row["pacing"])})


def _interaction(row: sql.RowMapping) -> Interaction:
    names = ("event_id", "prompt", "transition_chunks", "chunk", "pixel_frame")
    return Interaction(**{name: row[name] for name in names})


def _interactions(connection: sql.Connection, video_id: str) -> tuple[Interaction, ...]:
    query = _INTERACTIONS.select().where(_INTERACTIONS.c.video_id == video_id).order_by(_INTERACTIONS.c.number)
    return tuple(_interaction(row) for row in connection.execute(query).mappings())


def _tune_sqlite(connection: Any, _: Any) -> None:
    # Readers do not wait for the writer; a crash of the machine may lose the newest commits, never the file.
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
