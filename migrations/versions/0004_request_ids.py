"""The id of the request that made a row, so that logs can be followed from the request to the run.

Adds a column that may be null: no table is rewritten, and the old version works on the new tables.

Revision: 0004_request_ids
Follows: 0003_scheduling
"""

import sqlalchemy as sa
from alembic import op

revision = "0004_request_ids"
down_revision = "0003_scheduling"
branch_labels = None
depends_on = None

TABLES = ("datasets", "checkpoints", "jobs")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("request_id", sa.String(length=64), nullable=True))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "request_id")
