"""Videos, their chunks and interactions."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op
from sqlalchemy import Column, Float, Integer, String, Text

revision, down_revision = "0001", None


def upgrade() -> None:
    op.create_table(
        "videos",
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
    op.create_table(
        "chunks",
        Column("video_id", String(64), primary_key=True),
        Column("chunk", Integer, primary_key=True),
        Column("frames", Integer, nullable=False),
        Column("first_pixel_frame", Integer, nullable=False),
    )
    op.create_table(
        "interactions",
        Column("number", Integer, primary_key=True, autoincrement=True),
        Column("video_id", String(64), nullable=False, index=True),
        Column("event_id", String(128), nullable=False),
        Column("prompt", Text, nullable=False),
        Column("transition_chunks", Integer, nullable=False),
        Column("chunk", Integer),
        Column("pixel_frame", Integer),
        sql.UniqueConstraint("video_id", "event_id"),
    )


def downgrade() -> None:
    raise NotImplementedError("nothing is older than the first version")
