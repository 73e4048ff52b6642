"""The span in which a row was made, so that every attempt at it joins that trace, whichever message led to it.

Adds a column that may be null: no table is rewritten, and the old version works on the new tables.

Revision: 0006_traces
Follows: 0005_retention
"""

import sqlalchemy as sa
from alembic import op

revision = "0006_traces"
down_revision = "0005_retention"
branch_labels = None
depends_on = None

TABLES = ("datasets", "checkpoints", "jobs")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("traceparent", sa.String(length=55), nullable=True))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "traceparent")
