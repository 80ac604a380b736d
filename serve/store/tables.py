"""The store's tables, their version, and the steps that bring an older database to it.

SQLite by default, PostgreSQL by URL. Every write is one transaction that is on the disk before it is acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Column, Float, Index, Integer, MetaData, String, Table, Text

from serve.records import LOCAL

VERSION = 4
_BUSY_TIMEOUT_MS = 15_000
_MIGRATION_LOCK = 7_046_029_254_386_353_131  # an advisory lock's number, the same in every process
_TABLES = MetaData()

SCHEMA = Table("schema", _TABLES, Column("version", Integer, nullable=False))
VIDEOS = Table(
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
    _TABLES,
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
    _TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("video_id", String(64), nullable=False, index=True),
    Column("event_id", String(128), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("transition_chunks", Integer, nullable=False),
    Column("chunk", Integer),
    Column("pixel_frame", Integer),
    Column("kind", String(16), nullable=False, server_default="prompt"),
    sql.UniqueConstraint("video_id", "event_id"),
)
KEYS = Table(
    "keys",
    _TABLES,
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
    _TABLES,
    Column("id", String(32), primary_key=True),
    Column("hash", String(64), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
)
USAGE = Table(
    "usage",
    _TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("account", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("frames", Integer, nullable=False),
    Index("usage_of_account", "account", "at"),
)
IDEMPOTENCY = Table(
    "idempotency",
    _TABLES,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("video_id", String(64), nullable=False, index=True),
    Column("created_at", Float, nullable=False, index=True),
)


class Tables:
    """A database at the newest version. Safe to use from several threads; several processes may share it."""

    def __init__(self, url: str) -> None:
        """Connect and migrate; a database of a newer version than this program's raises `RuntimeError`."""
        self._engine = sql.create_engine(url, pool_pre_ping=True, hide_parameters=True)  # prompts stay out of errors
        if self._engine.dialect.name == "sqlite":
            sql.event.listen(self._engine, "connect", _tune_sqlite)
            sql.event.listen(self._engine, "begin", _begin_sqlite)
        self._migrate()

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

    def _migrate(self) -> None:
        with self.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            version = _version(connection)
            if version > VERSION:
                raise RuntimeError(f"the database has version {version}, this program knows up to {VERSION}")
            if version == 0:
                _TABLES.create_all(connection)
            for step in _STEPS[max(0, version - 1) :] if version else ():
                step(connection)
            connection.execute(SCHEMA.delete())
            connection.execute(SCHEMA.insert().values(version=VERSION))


def _version(connection: sql.Connection) -> int:
    """0 for an empty database; the first version had no table that says so."""
    there = set(sql.inspect(connection).get_table_names())
    if SCHEMA.name in there:
        return int(connection.execute(sql.select(SCHEMA.c.version)).scalar_one())
    return 1 if VIDEOS.name in there else 0


def _to_2(connection: sql.Connection) -> None:
    """Owners, expiry, resume tokens, hashes of chunks; keys, their quotas and what they did."""
    added = {
        VIDEOS: ("owner", "account", "expires_at", "resume_hash", "paused"),
        CHUNKS: ("file", "sha256", "snapshot", "whole_snapshot"),
        INTERACTIONS: ("kind",),
    }
    _add_columns(connection, added)
    for index in VIDEOS.indexes:
        index.create(connection)
    _TABLES.create_all(connection, [SCHEMA, KEYS, CLIENT_SECRETS, USAGE, IDEMPOTENCY])


def _to_3(connection: sql.Connection) -> None:
    """The signed chain of chunks, and what content credentials say of a video."""
    chain = ("last", "previous", "signature", "public_key")
    _add_columns(connection, {VIDEOS: ("release_sha256", "prompt_salt"), CHUNKS: chain})


def _to_4(connection: sql.Connection) -> None:
    """Whether a log for a replay is kept."""
    _add_columns(connection, {VIDEOS: ("record",)})


def _add_columns(connection: sql.Connection, added: Mapping[Table, tuple[str, ...]]) -> None:
    for table, names in added.items():
        for name in names:
            column = sql.schema.CreateColumn(table.c[name]).compile(dialect=connection.dialect)
            connection.execute(sql.text(f"ALTER TABLE {table.name} ADD COLUMN {column}"))


_STEPS: tuple[Callable[[sql.Connection], None], ...] = (_to_2, _to_3, _to_4)


def _tune_sqlite(connection: Any, _: Any) -> None:
    """Readers do not wait for the writer, a commit is on the disk, a second process waits its turn.

    What is deleted is overwritten: a prompt is gone with its video, not only out of sight.
    """
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, tables included
    cursor = connection.cursor()
    settings = ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={_BUSY_TIMEOUT_MS}", "secure_delete=ON")
    for pragma in settings:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sql.Connection) -> None:
    """A writer takes the lock at once: one that read first could not wait for it later."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
