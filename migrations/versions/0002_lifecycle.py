"""What is held against a row and when it may be tried again, what was adjusted, and where a message comes from.

Revision: 0002_lifecycle
Follows: 0001
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002_lifecycle"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
LEASED = ("datasets", "checkpoints", "jobs")


def upgrade() -> None:
    # A constant default: PostgreSQL writes no row for it, and workers of the version before go on meanwhile.
    for table in LEASED:
        op.add_column(table, sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
        op.add_column(table, sa.Column("not_before", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("adjustments", JSON, nullable=True))
    with op.batch_alter_table("job_events") as batch:
        batch.add_column(sa.Column("origin", sa.String(length=60), nullable=True))
        batch.create_unique_constraint(op.f("uq_job_events_job_id_origin"), ["job_id", "origin"])


def downgrade() -> None:
    with op.batch_alter_table("job_events") as batch:
        batch.drop_constraint(op.f("uq_job_events_job_id_origin"), type_="unique")
        batch.drop_column("origin")
    op.drop_column("jobs", "adjustments")
    for table in reversed(LEASED):
        op.drop_column(table, "not_before")
        op.drop_column(table, "losses")
