"""The tables. Every row of a tenant carries `tenant_id`; what a worker claims carries a lease."""

from datetime import datetime
from typing import Any, ClassVar, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.db import UTCDateTime, utcnow
from app.logs import current_request_id
from app.states import CANCELLING, CHECKING, PAUSING, PREPARING, QUEUED, RUNNING
from app.traces import TRACEPARENT_LENGTH, current_traceparent

# `none_as_null`: Python's None is SQL's NULL, never JSON's `null`.
Json = JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
# SQLite numbers rows by itself only in a column declared INTEGER.
AutoId = BigInteger().with_variant(Integer, "sqlite")
Id = String(40)

MAX_PRIORITY = 100
"""A job's priority is between its negative and itself."""


def _where(condition: str) -> dict[str, Any]:
    """Return the arguments that make an index partial on both databases."""
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


class Base(DeclarativeBase):
    """Declarative base: constraint names are fixed so that migrations can name them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: UTCDateTime(), dict[str, Any]: Json, list[str]: Json}


class Tenant(Base):
    """A team. It sees its own rows only."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    # What differs from the service's quotas: {"queued_jobs": 100, "datasets": null for no limit, …}.
    limits: Mapped[dict[str, Any] | None]


class ApiKey(Base):
    """An API key: only its keyed hash is stored. The random part has 256 bits, so a fast hash is enough."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(200))
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    revoked_at: Mapped[datetime | None]
    # The highest priority that this key may give a job.
    max_priority: Mapped[int] = mapped_column(default=MAX_PRIORITY, server_default=str(MAX_PRIORITY))


class Worker(Base):
    """A worker that is up, or was lately: what it has, and when it was last heard of. See `app.workers.service`."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Id, primary_key=True)  # another one at each start
    name: Mapped[str] = mapped_column(String(200))
    host: Mapped[str] = mapped_column(String(200))
    queues: Mapped[list[str]]
    labels: Mapped[list[str]]
    device: Mapped[str] = mapped_column(String(10))  # cuda or cpu
    gpus: Mapped[int]
    gpu_memory_gb: Mapped[float | None]  # of its smallest GPU
    processes: Mapped[int]  # the most `resources.gpus` that it takes
    draining: Mapped[bool] = mapped_column(default=False)  # finishes what it has and takes nothing new
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class Leased:
    """A row that a worker claims, renews and finishes: see `app.queue.leases`.

    `attempt` counts claims and is the fencing token: every write of a worker is conditional on the attempt it
    claimed, so one that lost its lease can change nothing. `failed_attempts` counts attempts in a row whose worker was
    lost or whose machine failed, with no new training checkpoint between them.
    """

    CLAIMABLE: ClassVar[str] = QUEUED
    CLAIMED: ClassVar[str]
    HELD: ClassVar[frozenset[str]]
    TASK: ClassVar[str]
    QUEUE: ClassVar[str]

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(20))
    failure: Mapped[dict[str, Any] | None]
    attempt: Mapped[int] = mapped_column(default=0)
    # The column keeps its old name. In an upgrade processes of the release before still use the migrated tables, and
    # they know only that name; 1.0, whose upgrade stops all processes first, renames it.
    failed_attempts: Mapped[int] = mapped_column("losses", default=0, server_default="0")
    not_before: Mapped[datetime | None]  # when a queued row may be claimed, where that is not at once
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None]
    enqueued_at: Mapped[datetime | None]
    # Of the request that made the row, so that every log line about it can be found by the id that its sender got.
    request_id: Mapped[str | None] = mapped_column(String(64), default=current_request_id)
    # Likewise, of its trace: a message may be lost or sent again, and an attempt may be the second, hours later.
    traceparent: Mapped[str | None] = mapped_column(String(TRACEPARENT_LENGTH), default=current_traceparent)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Dataset(Leased, Base):
    """Images with boxes: imported, checked and kept in one canonical form."""

    __tablename__ = "datasets"
    __table_args__ = (
        Index("ix_datasets_page", "tenant_id", "created_at", "id"),
        Index("ix_datasets_lease", "status", "lease_expires_at"),
        Index("ix_datasets_service", "tenant_id", "started_at"),
    )
    CLAIMED = CHECKING
    HELD = frozenset({CHECKING})
    TASK = "worker.tasks.import_dataset"
    QUEUE = "checks"

    source: Mapped[dict[str, Any]]  # {"kind": "upload"} or {"kind": "reference", "uri": "file://…"}
    max_dropped_fraction: Mapped[float]
    upload_key: Mapped[str | None] = mapped_column(String(200))
    upload_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of the object at upload_key
    storage_key: Mapped[str | None] = mapped_column(String(200))
    content_hash: Mapped[str | None] = mapped_column(String(80))
    format: Mapped[str | None] = mapped_column(String(20))
    classes: Mapped[list[str] | None]
    splits: Mapped[dict[str, Any] | None]  # {"train": {"images": n, "boxes": n}, …}
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any] | None]


class Checkpoint(Leased, Base):
    """A detector's weights: uploaded, or trained as a job's teacher."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        Index("ix_checkpoints_page", "tenant_id", "created_at", "id"),
        Index("ix_checkpoints_lease", "status", "lease_expires_at"),
        Index("ix_checkpoints_service", "tenant_id", "started_at"),
    )
    CLAIMED = CHECKING
    HELD = frozenset({CHECKING})
    TASK = "worker.tasks.check_checkpoint"
    QUEUE = "checks"

    detector: Mapped[dict[str, Any] | None]  # a detector spec; null until known where the file carries its own
    classes: Mapped[list[str] | None]
    upload_key: Mapped[str | None] = mapped_column(String(200))
    upload_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of the object at upload_key
    storage_key: Mapped[str | None] = mapped_column(String(200))
    sha256: Mapped[str | None] = mapped_column(String(64))
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    coverage: Mapped[dict[str, Any] | None]  # {"loaded": n, "total": n, "missing": [...], "unexpected": [...]}
    source_job_id: Mapped[str | None] = mapped_column(Id)
    downloaded_at: Mapped[datetime | None]  # the last time, to about an hour


class Job(Leased, Base):
    """One distillation: what was asked, where it is, what came out."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_page", "tenant_id", "created_at", "id"),
        Index("ix_jobs_lease", "status", "lease_expires_at"),
        # A filtered page reads as many rows as it shows, however many jobs there are of other states and datasets.
        Index("ix_jobs_status_page", "tenant_id", "status", "created_at", "id"),
        Index("ix_jobs_dataset_page", "dataset_id", "created_at", "id"),
        Index("ix_jobs_resume", "finished_at", **_where("resume_key IS NOT NULL")),
        Index("ix_jobs_history", "finished_at", **_where("history_swept_at IS NULL")),
        Index("ix_jobs_service", "tenant_id", "started_at"),
        Index("ix_jobs_next", "status", "tenant_id", text("priority DESC"), "created_at", "id"),
        Index("ix_jobs_recipe", "recipe", "status", "finished_at"),
    )
    CLAIMED = PREPARING
    HELD = frozenset({PREPARING, RUNNING, PAUSING, CANCELLING})
    TASK = "worker.tasks.run_job"
    QUEUE = "jobs"

    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    spec: Mapped[dict[str, Any]]  # resolved: every default filled in
    labels: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    # What the spec's `resources` ask of a worker, as columns that a claim can compare.
    gpus: Mapped[int] = mapped_column(default=1, server_default="1")
    gpu_memory_gb: Mapped[float | None]
    worker_label: Mapped[str | None] = mapped_column(String(50))
    # What durations are learned by, see `app.jobs.durations`; null in rows that are older than that.
    recipe: Mapped[str | None] = mapped_column(String(40))
    workload: Mapped[float | None]
    progress: Mapped[dict[str, Any] | None]
    results: Mapped[dict[str, Any] | None]
    # The run's newest training checkpoint in the object store, from which another attempt goes on; a job that failed or
    # was cancelled keeps it for `retry`.
    resume_key: Mapped[str | None] = mapped_column(String(200))
    # What the service changed in the spec so that it fits into memory: the new values, in the spec's own shape.
    adjustments: Mapped[dict[str, Any] | None]
    # When retention reduced the ended job's events and metrics; null again when another attempt ends.
    history_swept_at: Mapped[datetime | None]


LEASED: Final[tuple[type[Dataset] | type[Checkpoint] | type[Job], ...]] = (Dataset, Checkpoint, Job)
"""What workers claim."""
QUEUES: Final = sorted({model.QUEUE for model in LEASED})
"""What workers take messages from."""


class JobEvent(Base):
    """A message about a job for people: what happened, with a level.

    `origin` is where a worker's message comes from: the attempt, and the place in its run's `events.jsonl`. A message
    that is sent again, because the answer to its commit was lost, is so found to be there.
    """

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_page", "job_id", "id"), UniqueConstraint("job_id", "origin"))

    id: Mapped[int] = mapped_column(AutoId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(10))  # info, warn, error
    code: Mapped[str] = mapped_column(String(60))
    message: Mapped[str] = mapped_column(Text)
    origin: Mapped[str | None] = mapped_column(String(60))
    created_at: Mapped[datetime] = mapped_column(default=utcnow)


class JobMetric(Base):
    """What was logged at one optimiser step: one row with all its values, so a run of any attempt writes it once."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    subject: Mapped[str] = mapped_column(String(10), primary_key=True)  # teacher or student: who is being trained
    step: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[float]
    values: Mapped[dict[str, Any]]  # {"loss/total": 1.2, "learning_rate": 0.01, "images_per_s": 20.1, …}


class JobEvaluation(Base):
    """COCO metrics of one detector of a job after one epoch (0: before training)."""

    __tablename__ = "job_evaluations"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    subject: Mapped[str] = mapped_column(String(10), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    metrics: Mapped[dict[str, Any]]


class Artifact(Base):
    """A file that a job left: students, metrics, log, gallery images."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "name"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(200))  # student-best.safetensors, gallery/0.jpg, …
    kind: Mapped[str] = mapped_column(String(20))  # student, teacher, metrics, log, gallery
    content_type: Mapped[str] = mapped_column(String(100))
    storage_key: Mapped[str] = mapped_column(String(300))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    details: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)


class IdempotencyKey(Base):
    """What a POST with an `Idempotency-Key` answered, so that the same request again creates nothing new."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    route: Mapped[str] = mapped_column(String(40), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    response: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=utcnow, index=True)


class SweepPass(Base):
    """A sweep that one process at a time carries out, and not more often than is set: see `app.retention`."""

    __tablename__ = "sweep_passes"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    began_at: Mapped[datetime]
    cursor: Mapped[str | None] = mapped_column(String(300))  # the last object that was looked at; null: begin anew
