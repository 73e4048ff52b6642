"""Retention and quotas: a tenant's limits, sizes of uploads, passes of the sweep; indexes for filtered pages.

Revision: 0005_retention
Follows: 0004_request_ids
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005_retention"
down_revision = "0004_request_ids"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
MOMENT = sa.DateTime(timezone=True)


def _partial_index(name: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, "jobs", ["finished_at"], postgresql_where=where, sqlite_where=where)


def upgrade() -> None:
    op.add_column("tenants", sa.Column("limits", JSON, nullable=True))
    op.add_column("datasets", sa.Column("upload_bytes", sa.BigInteger(), nullable=True))
    op.add_column("checkpoints", sa.Column("upload_bytes", sa.BigInteger(), nullable=True))
    op.add_column("checkpoints", sa.Column("downloaded_at", MOMENT, nullable=True))
    op.add_column("jobs", sa.Column("history_swept_at", MOMENT, nullable=True))

    op.drop_index(op.f("ix_jobs_dataset_id"), "jobs")
    op.create_index("ix_jobs_dataset_page", "jobs", ["dataset_id", "created_at", "id"])
    op.create_index("ix_jobs_status_page", "jobs", ["tenant_id", "status", "created_at", "id"])
    _partial_index("ix_jobs_resume", "resume_key IS NOT NULL")
    _partial_index("ix_jobs_history", "history_swept_at IS NULL")

    op.create_table(
        "sweep_passes",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("began_at", MOMENT, nullable=False),
        sa.Column("cursor", sa.String(length=300), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_sweep_passes")),
    )


def downgrade() -> None:
    op.drop_table("sweep_passes")

    for name in ("ix_jobs_history", "ix_jobs_resume", "ix_jobs_status_page", "ix_jobs_dataset_page"):
        op.drop_index(name, "jobs")
    op.create_index(op.f("ix_jobs_dataset_id"), "jobs", ["dataset_id"])

    op.drop_column("jobs", "history_swept_at")
    op.drop_column("checkpoints", "downloaded_at")
    op.drop_column("checkpoints", "upload_bytes")
    op.drop_column("datasets", "upload_bytes")
    op.drop_column("tenants", "limits")
