"""The signed chain of chunks, and what content credentials say of a video."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from alembic import op
from sqlalchemy import Column, String

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    text: dict[str, Any] = {"nullable": False, "server_default": ""}
    op.add_column("videos", Column("release_sha256", String(64), **text))
    op.add_column("videos", Column("prompt_salt", String(64), **text))
    op.add_column("chunks", Column("last", sql.Boolean, nullable=False, server_default=sql.false()))
    op.add_column("chunks", Column("previous", String(128), **text))
    op.add_column("chunks", Column("signature", String(128), **text))
    op.add_column("chunks", Column("public_key", String(64), **text))


def downgrade() -> None:
    raise NotImplementedError("it would lose the signatures of chunks")
