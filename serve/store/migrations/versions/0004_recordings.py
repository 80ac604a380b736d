"""Whether a log for a replay is kept."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op
from sqlalchemy import Column

revision, down_revision = "0004", "0003"


def upgrade() -> None:
    op.add_column("videos", Column("record", sql.Boolean, nullable=False, server_default=sql.false()))


def downgrade() -> None:
    raise NotImplementedError("it would lose which videos are recorded")
