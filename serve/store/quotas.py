"""Who may begin a video: idempotent requests, and the quotas of an account. One transaction decides all of it."""

from __future__ import annotations

import sqlalchemy as sql

from serve.records import WINDOW_S, Caller, Idempotency, Pacing, Refused, Status, Usage, VideoRecord
from serve.store.database import read_video, video_row
from serve.store.tables import IDEMPOTENCY, USAGE, VIDEOS, Tables

IN_FLIGHT_S = 60.0  # after that, whoever was to answer is gone
REMEMBERED_S = 24 * 3600.0
_SESSIONS_RETRY_S = 5.0
_RUNNING = (Status.QUEUED.value, Status.IN_PROGRESS.value)


def frame_cost(video: VideoRecord) -> int:
    """What a video is charged at once: all of a file's frames, the first minute of a stream's.

    Every frame of a model costs the same; larger files are enlarged, not drawn larger.
    """
    if video.pacing is Pacing.REALTIME:
        minute = int(WINDOW_S) * video.fps
        return minute if video.endless else min(video.frames, minute)
    return video.frames


class Quotas:
    """Admits videos. Safe to use from several threads and processes."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def admit(
        self, video: VideoRecord, caller: Caller, idempotency: Idempotency | None, now: float
    ) -> VideoRecord | Refused | None:
        """Keep a new video (None), or name the one that this request made before, or say why not."""
        with self._tables.writing() as connection:
            _lock_account(connection, caller.account)
            if idempotency is not None:
                known = _replayed(connection, video, idempotency, now)
                if known is not None:
                    return known
            refusal = _over_quota(connection, caller, frame_cost(video), now)
            if refusal is not None:
                return refusal
            if idempotency is not None:
                key = {"owner": video.owner, "key": idempotency.key, "created_at": now}
                values = {"body_hash": idempotency.body_hash, "video_id": video.id}
                connection.execute(IDEMPOTENCY.insert().values(**key, **values))
            connection.execute(VIDEOS.insert().values(**video_row(video)))
            if caller.frames_per_minute:
                connection.execute(USAGE.insert().values(account=caller.account, at=now, frames=frame_cost(video)))
            return None

    def withdraw(self, video: VideoRecord, caller: Caller) -> None:
        """Forget an admitted video that no replica took, and what it was charged."""
        with self._tables.writing() as connection:
            connection.execute(VIDEOS.delete().where(VIDEOS.c.id == video.id))
            connection.execute(IDEMPOTENCY.delete().where(IDEMPOTENCY.c.video_id == video.id))
            if caller.frames_per_minute:
                same = (USAGE.c.account == caller.account) & (USAGE.c.frames == frame_cost(video))
                newest = sql.select(sql.func.max(USAGE.c.number)).where(same).scalar_subquery()
                connection.execute(USAGE.delete().where(USAGE.c.number == newest))

    def usage(self, caller: Caller, now: float) -> Usage:
        """What the caller's account used of its quotas."""
        recent = (USAGE.c.account == caller.account) & (USAGE.c.at > now - WINDOW_S)
        sums = sql.select(sql.func.coalesce(sql.func.sum(USAGE.c.frames), 0), sql.func.min(USAGE.c.at)).where(recent)
        with self._tables.reading() as connection:
            frames, first_at = connection.execute(sums).one()
            sessions = _sessions(connection, caller.account)
        return Usage(sessions, int(frames), 0.0 if first_at is None else first_at + WINDOW_S - now)

    def prune(self, now: float) -> None:
        """Drop what no later decision needs."""
        with self._tables.writing() as connection:
            connection.execute(USAGE.delete().where(USAGE.c.at < now - WINDOW_S))
            connection.execute(IDEMPOTENCY.delete().where(IDEMPOTENCY.c.created_at < now - REMEMBERED_S))


def _lock_account(connection: sql.Connection, account: str) -> None:
    """Two requests of an account are decided one after the other; SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(sql.func.hashtext(account))))


def _replayed(
    connection: sql.Connection, video: VideoRecord, asked: Idempotency, now: float
) -> VideoRecord | Refused | None:
    mine = (IDEMPOTENCY.c.owner == video.owner) & (IDEMPOTENCY.c.key == asked.key)
    row = connection.execute(IDEMPOTENCY.select().where(mine)).first()
    if row is None:
        return None
    if row.body_hash != asked.body_hash:
        return Refused("idempotency_conflict", "this Idempotency-Key came before, with another body")
    found = connection.execute(VIDEOS.select().where(VIDEOS.c.id == row.video_id)).mappings().first()
    known = None if found is None else read_video(found)
    if known is not None and known.status is not Status.QUEUED:
        return known
    if now - row.created_at < IN_FLIGHT_S:
        return Refused("idempotency_in_flight", "the first request with this Idempotency-Key is still under way")
    connection.execute(IDEMPOTENCY.delete().where(mine))
    return None


def _over_quota(connection: sql.Connection, caller: Caller, cost: int, now: float) -> Refused | None:
    if caller.frames_per_minute and cost > caller.frames_per_minute:
        message = f"{cost} frames at once: this key may make {caller.frames_per_minute} a minute"
        return Refused("quota_too_small", message, "num_frames")
    if caller.sessions:
        if _sessions(connection, caller.account) >= caller.sessions:
            message = f"{caller.sessions} videos at once are under way, which is this key's limit"
            return Refused("session_quota_exceeded", message, retry_after_s=_SESSIONS_RETRY_S)
    if caller.frames_per_minute:
        wait_s = _frames_wait_s(connection, caller, cost, now)
        if wait_s is not None:
            message = f"this key may make {caller.frames_per_minute} frames a minute"
            return Refused("frame_quota_exceeded", message, retry_after_s=wait_s)
    return None


def _sessions(connection: sql.Connection, account: str) -> int:
    """Videos of the account of which chunks are still to be made."""
    undrawn = (VIDEOS.c.frames == 0) | (VIDEOS.c.frames_done < VIDEOS.c.frames)
    mine = (VIDEOS.c.account == account) & VIDEOS.c.status.in_(_RUNNING) & undrawn
    return int(connection.execute(sql.select(sql.func.count()).select_from(VIDEOS).where(mine)).scalar_one())


def _frames_wait_s(connection: sql.Connection, caller: Caller, cost: int, now: float) -> float | None:
    """How long until `cost` frames fit into the window; None when they fit now."""
    recent = (USAGE.c.account == caller.account) & (USAGE.c.at > now - WINDOW_S)
    rows = connection.execute(sql.select(USAGE.c.at, USAGE.c.frames).where(recent).order_by(USAGE.c.at)).all()
    used = sum(row.frames for row in rows)
    for row in rows:
        if used + cost <= caller.frames_per_minute:
            break
        used -= row.frames
        if used + cost <= caller.frames_per_minute:
            return max(1.0, row.at + WINDOW_S - now)
    return None if used + cost <= caller.frames_per_minute else WINDOW_S
