"""The store's tables. Every write is one transaction that is on the disk before it is acknowledged.

A change of a table here needs a step in `serve/store/migrations/versions`, which names its columns itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sql
from sqlalchemy import Column, Float, Index, Integer, MetaData, String, Table, Text

from serve.records import LOCAL
from serve.store.connection import connect
from serve.store.migrations import upgrade

TABLES = MetaData()

VIDEOS = Table(
    "videos",
    TABLES,
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
    Column("owner", String(64), nullable=False, server_default=LOCAL),
    Column("account", String(64), nullable=False, server_default=LOCAL),
    Column("expires_at", Float),
    Column("resume_hash", String(64), nullable=False, server_default=""),
    Column("paused", sql.Boolean, nullable=False, server_default=sql.false()),
    Column("release_sha256", String(64), nullable=False, server_default=""),
    Column("prompt_salt", String(64), nullable=False, server_default=""),
    Column("record", sql.Boolean, nullable=False, server_default=sql.false()),
    Index("videos_by_resume_hash", "resume_hash"),
)
CHUNKS = Table(
    "chunks",
    TABLES,
    Column("video_id", String(64), primary_key=True),
    Column("chunk", Integer, primary_key=True),
    Column("frames", Integer, nullable=False),
    Column("first_pixel_frame", Integer, nullable=False),
    Column("file", String(64), nullable=False, server_default=""),
    Column("sha256", String(64), nullable=False, server_default=""),
    Column("snapshot", String(64), nullable=False, server_default=""),
    Column("whole_snapshot", sql.Boolean, nullable=False, server_default=sql.false()),
    Column("last", sql.Boolean, nullable=False, server_default=sql.false()),
    Column("previous", String(128), nullable=False, server_default=""),
    Column("signature", String(128), nullable=False, server_default=""),
    Column("public_key", String(64), nullable=False, server_default=""),
)
INTERACTIONS = Table(
    "interactions",
    TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("video_id", String(64), nullable=False, index=True),
    Column("event_id", String(128), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("transition_chunks", Integer, nullable=False),
    Column("chunk", Integer),
    Column("pixel_frame", Integer),
    Column("kind", String(16), nullable=False, server_default="prompt"),
    Column("made_by", String(64), nullable=False, server_default=""),
    sql.UniqueConstraint("video_id", "event_id"),
)
KEYS = Table(
    "keys",
    TABLES,
    Column("id", String(32), primary_key=True),
    Column("hash", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("account", String(64), nullable=False),
    Column("sessions", Integer, nullable=False),
    Column("frames_per_minute", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)
CLIENT_SECRETS = Table(
    "client_secrets",
    TABLES,
    Column("id", String(32), primary_key=True),
    Column("hash", String(64), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
)
VIEWERS = Table(
    "viewers",
    TABLES,
    Column("id", String(32), primary_key=True),
    Column("hash", String(64), nullable=False),
    Column("video_id", String(64), nullable=False, index=True),
    Column("role", String(16), nullable=False),
    Column("name", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
)
USAGE = Table(
    "usage",
    TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("account", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("frames", Integer, nullable=False),
    Index("usage_of_account", "account", "at"),
)
IDEMPOTENCY = Table(
    "idempotency",
    TABLES,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("video_id", String(64), nullable=False, index=True),
    Column("created_at", Float, nullable=False, index=True),
)


class Tables:
    """A database at the newest version. Safe to use from several threads; several processes may share it."""

    def __init__(self, url: str, wait_s: float = 0.0) -> None:
        """Connect, waiting up to `wait_s` seconds for the database, and migrate.

        `FieldError` for what `connect` refuses, and for a database of a newer version than this program's.
        """
        self._engine = connect(url, wait_s)
        with self.writing() as connection:
            upgrade(connection)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """One consistent view."""
        with self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """One transaction: it happens whole, and is on the disk when the block ends, or not at all."""
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection
