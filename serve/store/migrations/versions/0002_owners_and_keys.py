"""Owners, expiry, resume tokens, hashes of chunks; keys, their quotas and what they did."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from alembic import op
from sqlalchemy import Column, Float, Integer, String

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    text: dict[str, Any] = {"nullable": False, "server_default": ""}
    false: dict[str, Any] = {"nullable": False, "server_default": sql.false()}
    local: dict[str, Any] = {"nullable": False, "server_default": "local"}
    op.add_column("videos", Column("owner", String(64), **local))
    op.add_column("videos", Column("account", String(64), **local))
    op.add_column("videos", Column("expires_at", Float))
    op.add_column("videos", Column("resume_hash", String(64), **text))
    op.add_column("videos", Column("paused", sql.Boolean, **false))
    op.create_index("videos_by_resume_hash", "videos", ["resume_hash"])
    op.add_column("chunks", Column("file", String(64), **text))
    op.add_column("chunks", Column("sha256", String(64), **text))
    op.add_column("chunks", Column("snapshot", String(64), **text))
    op.add_column("chunks", Column("whole_snapshot", sql.Boolean, **false))
    op.add_column("interactions", Column("kind", String(16), nullable=False, server_default="prompt"))
    op.create_table("schema", Column("version", Integer, nullable=False))
    op.create_table(
        "keys",
        Column("id", String(32), primary_key=True),
        Column("hash", String(64), nullable=False),
        Column("name", String(128), nullable=False),
        Column("account", String(64), nullable=False),
        Column("sessions", Integer, nullable=False),
        Column("frames_per_minute", Integer, nullable=False),
        Column("created_at", Float, nullable=False),
        Column("revoked_at", Float),
    )
    op.create_table(
        "client_secrets",
        Column("id", String(32), primary_key=True),
        Column("hash", String(64), nullable=False),
        Column("key_id", String(32), nullable=False),
        Column("expires_at", Float, nullable=False, index=True),
    )
    op.create_table(
        "usage",
        Column("number", Integer, primary_key=True, autoincrement=True),
        Column("account", String(64), nullable=False),
        Column("at", Float, nullable=False),
        Column("frames", Integer, nullable=False),
    )
    op.create_index("usage_of_account", "usage", ["account", "at"])
    op.create_table(
        "idempotency",
        Column("owner", String(64), primary_key=True),
        Column("key", String(255), primary_key=True),
        Column("body_hash", String(64), nullable=False),
        Column("video_id", String(64), nullable=False, index=True),
        Column("created_at", Float, nullable=False, index=True),
    )


def downgrade() -> None:
    raise NotImplementedError("it would lose who owns a video, and every key")
