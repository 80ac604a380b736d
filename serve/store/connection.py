"""The store's database by its URL: checked, and waited for where it starts later than the service.

SQLite by default, PostgreSQL by URL. An error is one line, which names no secret.
"""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sql

from diagonal.errors import FieldError, require

ALLOWED = "sqlite:///path, postgresql://user@host/name, or $NAME of a variable that holds one; '@' in a password is %40"
LATE_S = 600.0
_LOOK_EVERY_S, _SAY_EVERY_S, _CONNECT_TIMEOUT_S = 2.0, 20.0, 10
_BUSY_TIMEOUT_MS = 15_000
_DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg", "sqlite": "sqlite"}
_REFUSED, _STARTING = "FATAL", "the database system is"  # how PostgreSQL begins what no waiting mends, and what it does
_NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "glusterfs", "9p", "afs", "beegfs", "gpfs", "fuse.")
_LOCAL_FUSE = ("fuse.fuse-overlayfs",)

_log = logging.getLogger(__name__)


def connect(url: str, wait_s: float = 0.0) -> sql.Engine:
    """An engine for the database at `url`, once it answers; it is waited for up to `wait_s` seconds.

    `FieldError` for a wrong URL, a missing driver, a network file system under SQLite, refused credentials, and for a
    database that does not answer in time.
    """
    parsed = _parsed(url)
    if parsed.drivername == "sqlite":
        _require_local_disk(Path(parsed.database or "").absolute())
    try:
        engine = sql.create_engine(  # prompts stay out of errors
            parsed, pool_pre_ping=True, hide_parameters=True, connect_args=_arguments(parsed)
        )
    except ModuleNotFoundError as error:
        allowed = f"used with the extra serve-postgres: there is no module {error.name}"
        raise FieldError("database", _shown(parsed), allowed) from None
    if parsed.drivername == "sqlite":
        sql.event.listen(engine, "connect", _tune_sqlite)
        sql.event.listen(engine, "begin", _begin_sqlite)
    _wait_for(engine, wait_s)
    return engine


def _parsed(url: str) -> sql.URL:
    text = url
    if url.startswith("$"):
        require(url[1:] in os.environ, "database", url, "$NAME of a variable that is set where the store runs")
        text = os.environ[url[1:]]
    try:
        parsed = sql.make_url(text)
    except (sql.exc.ArgumentError, ValueError):
        raise FieldError("database", "..." if "@" in text else text, ALLOWED) from None
    kind = parsed.drivername.partition("+")[0]
    right = kind in _DRIVERS and "@" not in (parsed.host or "")
    require(right, "database", _shown(parsed) if "@" not in (parsed.host or "") else "...", ALLOWED)
    return parsed.set(drivername=_DRIVERS[kind])


def _shown(url: sql.URL) -> str:
    return url.render_as_string(hide_password=True)


def _arguments(url: sql.URL) -> dict[str, Any]:
    """Without prepared statements a pooler such as PgBouncer may give each transaction another server connection."""
    if url.drivername == "sqlite":
        return {}
    return {"prepare_threshold": None, "connect_timeout": _CONNECT_TIMEOUT_S}


def _wait_for(engine: sql.Engine, wait_s: float) -> None:
    began_s, said_s = time.monotonic(), -math.inf
    while True:
        try:
            with engine.connect():
                return
        except sql.exc.OperationalError as error:
            cause, now_s = _cause(error, engine.url), time.monotonic()
            if now_s - began_s >= wait_s or not _may_come(str(error.orig), engine.dialect.name):
                engine.dispose()
                allowed = f"a database that answers: {cause}"
                raise FieldError("database", _shown(engine.url), allowed) from None
            if now_s - said_s >= _SAY_EVERY_S:
                said_s = now_s
                _log.warning("waiting for the database %s: %s", _shown(engine.url), cause)
            time.sleep(_LOOK_EVERY_S)


def _may_come(message: str, dialect: str) -> bool:
    """Whether the database may answer later: SQLite's file is there or not, a server may start and says so."""
    return dialect != "sqlite" and (_REFUSED not in message or _STARTING in message)


def _cause(error: sql.exc.OperationalError, url: sql.URL) -> str:
    text = " ".join(str(error.orig).split())
    return text.replace(str(url.password), "***") if url.password else text


def _require_local_disk(file: Path) -> None:
    """SQLite's locks do not hold on network file systems."""
    mounts = [one for one in psutil.disk_partitions(all=True) if file.is_relative_to(one.mountpoint)]
    kind = max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""
    right = not kind.startswith(_NETWORK) or kind in _LOCAL_FUSE
    require(
        right, "data", str(file.parent), f"a local disk, for SQLite (this is {kind}); or give `database`: PostgreSQL"
    )


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
