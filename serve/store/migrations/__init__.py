"""The steps that bring an older database to the newest version, by Alembic; a step names its tables and columns itself.

`alembic -c serve/store/migrations/alembic.ini upgrade head --sql` prints them for a database's administrator, and
`alembic ... upgrade 0003:head --sql` those from a version on.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sql
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from diagonal.errors import require

VERSION_TABLE = "alembic_version"
_LOCK = 7_046_029_254_386_353_131  # an advisory lock's number, the same in every process
_FOLDER = Path(__file__).parent


def configuration(connection: sql.Connection | None = None) -> Config:
    """Alembic's, for one connection, whose transaction holds all steps."""
    config = Config(_FOLDER / "alembic.ini")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: sql.Connection, version: str = "head") -> None:
    """Bring a database to `version` in the caller's transaction; `FieldError` where it is newer than this program."""
    if connection.dialect.name == "postgresql":
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_LOCK)))
    config = configuration(connection)
    script = ScriptDirectory.from_config(config)
    current = _version(connection)
    known = [one.revision for one in script.walk_revisions()]
    allowed = f"of a version that this program knows: up to {script.get_current_head()}"
    require(current is None or current in known, "database version", current, allowed)
    if current == script.get_current_head():
        return
    if current is not None:
        command.stamp(config, current)
    command.upgrade(config, version)


def _version(connection: sql.Connection) -> str | None:
    """None for an empty database. The first four versions were counted in a table of their own, the first in none."""
    there = set(sql.inspect(connection).get_table_names())
    if VERSION_TABLE in there:
        return str(connection.execute(sql.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one())
    if "schema" in there:
        return f"{connection.execute(sql.text('SELECT version FROM schema')).scalar_one():04d}"
    return "0001" if "videos" in there else None
