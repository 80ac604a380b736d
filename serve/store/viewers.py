"""Tokens of viewers in the database: of each only its hash is kept, and it ends with its video."""

from __future__ import annotations

import hmac

import sqlalchemy as sql

from serve.records import MAX_VIEWERS, Role, Viewer
from serve.store.tables import VIDEOS, VIEWERS, Tables
from serve.tokens import VIEWER, Secret, new_secret


class Viewers:
    """Whom owners let watch or steer a video of theirs. Safe to use from several threads and processes."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add(self, video_id: str, role: Role, name: str, now: float, seconds: float) -> tuple[str, Viewer] | None:
        """A new token, told this once, and its viewer, called by his id where he has no name.

        None where the video is gone, or has `MAX_VIEWERS` already.
        """
        text, secret = new_secret(VIEWER)
        viewer = Viewer(secret.id, video_id, role, name or secret.id, now, now + seconds)
        with self._tables.writing() as connection:
            video = connection.execute(sql.select(VIDEOS.c.id).where(VIDEOS.c.id == video_id).with_for_update()).first()
            count = sql.select(sql.func.count()).select_from(VIEWERS).where(_alive(video_id, now))
            if video is None or connection.execute(count).scalar_one() >= MAX_VIEWERS:
                return None
            connection.execute(VIEWERS.insert().values(**vars(viewer) | {"role": role.value, "hash": secret.hash}))
        return text, viewer

    def of(self, video_id: str, now: float) -> list[Viewer]:
        """A video's viewers whose tokens count still, the oldest first."""
        query = VIEWERS.select().where(_alive(video_id, now)).order_by(VIEWERS.c.created_at, VIEWERS.c.id)
        with self._tables.reading() as connection:
            return [_viewer(row) for row in connection.execute(query).mappings()]

    def revoke(self, video_id: str, viewer_id: str) -> bool:
        """End a token; False where the video has none of that viewer."""
        mine = (VIEWERS.c.id == viewer_id) & (VIEWERS.c.video_id == video_id)
        with self._tables.writing() as connection:
            return bool(connection.execute(VIEWERS.delete().where(mine)).rowcount)

    def find(self, shown: Secret, now: float) -> tuple[Viewer, str] | None:
        """The viewer whose token this is, and the owner of its video; None where it counts no more."""
        query = sql.select(VIEWERS, VIDEOS.c.owner).join(VIDEOS, VIDEOS.c.id == VIEWERS.c.video_id)
        with self._tables.reading() as connection:
            mine = (VIEWERS.c.id == shown.id) & (VIEWERS.c.expires_at > now)
            row = connection.execute(query.where(mine)).mappings().first()
        if row is None or not hmac.compare_digest(row["hash"], shown.hash):
            return None
        return _viewer(row), str(row["owner"])

    def prune(self, now: float) -> None:
        """Drop tokens that are past their time."""
        with self._tables.writing() as connection:
            connection.execute(VIEWERS.delete().where(VIEWERS.c.expires_at <= now))


def _alive(video_id: str, now: float) -> sql.ColumnElement[bool]:
    return (VIEWERS.c.video_id == video_id) & (VIEWERS.c.expires_at > now)


def _viewer(row: sql.RowMapping) -> Viewer:
    names = ("id", "video_id", "name", "created_at", "expires_at")
    return Viewer(**{name: row[name] for name in names}, role=Role(row["role"]))
