"""Tokens of viewers, and who made a prompt change."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, String

revision, down_revision = "0006", "0005"


def upgrade() -> None:
    op.add_column("interactions", Column("made_by", String(64), nullable=False, server_default=""))
    op.create_table(
        "viewers",
        Column("id", String(32), primary_key=True),
        Column("hash", String(64), nullable=False),
        Column("video_id", String(64), nullable=False, index=True),
        Column("role", String(16), nullable=False),
        Column("name", String(64), nullable=False),
        Column("created_at", Float, nullable=False),
        Column("expires_at", Float, nullable=False, index=True),
    )


def downgrade() -> None:
    op.drop_table("viewers")
    op.drop_column("interactions", "made_by")
