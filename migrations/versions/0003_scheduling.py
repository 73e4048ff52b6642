"""Who runs next, and where: workers, priorities, what jobs ask of a worker, what durations are learned by.

Revision: 0003_scheduling
Follows: 0002_lifecycle
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003_scheduling"
down_revision = "0002_lifecycle"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
MOMENT = sa.DateTime(timezone=True)
JOB_COLUMNS = ("priority", "gpus", "gpu_memory_gb", "worker_label", "recipe", "workload")
LEASED = ("checkpoints", "datasets", "jobs")


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("host", sa.String(length=200), nullable=False),
        sa.Column("queues", JSON, nullable=False),
        sa.Column("labels", JSON, nullable=False),
        sa.Column("device", sa.String(length=10), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("gpu_memory_gb", sa.Double(), nullable=True),
        sa.Column("processes", sa.Integer(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("seen_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    # Constant defaults: PostgreSQL adds such columns without rewriting the table.
    op.add_column("api_keys", sa.Column("max_priority", sa.Integer(), nullable=False, server_default="100"))
    op.add_column("jobs", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("gpus", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("jobs", sa.Column("gpu_memory_gb", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("worker_label", sa.String(length=50), nullable=True))
    op.add_column("jobs", sa.Column("recipe", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("workload", sa.Double(), nullable=True))
    gpus = "(spec->'resources'->>'gpus')" if op.get_bind().dialect.name == "postgresql" else "spec->>'$.resources.gpus'"
    op.execute(f"UPDATE jobs SET gpus = CAST({gpus} AS INTEGER) WHERE {gpus} IS NOT NULL AND status = 'queued'")  # noqa: S608
    for table in LEASED:
        op.create_index(f"ix_{table}_service", table, ["tenant_id", "started_at"])
    op.create_index("ix_jobs_next", "jobs", ["status", "tenant_id", sa.text("priority DESC"), "created_at", "id"])
    op.create_index("ix_jobs_recipe", "jobs", ["recipe", "status", "finished_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_recipe", "jobs")
    op.drop_index("ix_jobs_next", "jobs")
    for table in LEASED:
        op.drop_index(f"ix_{table}_service", table)
    for column in JOB_COLUMNS:
        op.drop_column("jobs", column)
    op.drop_column("api_keys", "max_priority")
    op.drop_table("workers")
