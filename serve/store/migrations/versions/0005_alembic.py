"""The version stands in Alembic's own table."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision, down_revision = "0005", "0004"


def upgrade() -> None:
    op.drop_table("schema")


def downgrade() -> None:
    op.create_table("schema", sql.Column("version", sql.Integer, nullable=False))
    op.execute("INSERT INTO schema (version) VALUES (4)")
