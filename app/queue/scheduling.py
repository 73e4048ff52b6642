"""Which row a worker claims next. A message only wakes a worker; the database chooses the row, here.

Rows whose worker was lost come first, because they have had their turn. Then come the rows that wait and that the
worker's resources satisfy, in this order: the highest priority; the tenant with the fewest rows in work, so that one
tenant's hundred jobs do not starve another tenant's single job; the tenant whose last row started longest ago; the
oldest row. Datasets and checkpoints have no priority and request no resources; the other rules hold for them too.

One probe of an index (`ix_jobs_next`) finds each tenant's first row, and one of another (`ix_…_service`) the start of
its last row. So the time of a choice depends on the number of tenants and of rows in work, not of rows that wait.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from app.db import now
from app.models import Checkpoint, Dataset, Job, Leased, Tenant, Worker
from app.states import CANCELLING, PAUSING

LeasedModel = type[Dataset] | type[Checkpoint] | type[Job]


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """What a worker has for a job.

    Attributes:
        processes: the largest `resources.gpus` that it can run.
        gpu_memory_gb: memory of its smallest GPU, GB; None: it has no GPU.
        labels: the values of `resources.label` that select it.
        worker_id: its row in the table of workers; None: it is not registered.
    """

    processes: int = 1
    gpu_memory_gb: float | None = None
    labels: frozenset[str] = frozenset()
    worker_id: str | None = None

    @classmethod
    def of(cls, worker: Worker) -> Self:
        """Return the resources of a registered worker."""
        return cls(
            processes=worker.processes,
            gpu_memory_gb=worker.gpu_memory_gb,
            labels=frozenset(worker.labels),
            worker_id=worker.id,
        )

    def satisfies(self, gpus: int, gpu_memory_gb: float | None, label: str | None) -> bool:
        """Return whether a job that requests this can run here; `_satisfied` is the same rule in SQL."""
        enough_memory = gpu_memory_gb is None or (self.gpu_memory_gb or 0) >= gpu_memory_gb
        return gpus <= self.processes and enough_memory and (label is None or label in self.labels)


def _satisfied(model: Any, resources: WorkerResources) -> list[ColumnElement[bool]]:
    if model is not Job:
        return []
    memory = resources.gpu_memory_gb or 0
    return [
        Job.gpus <= resources.processes,
        or_(Job.gpu_memory_gb.is_(None), Job.gpu_memory_gb <= memory),
        or_(Job.worker_label.is_(None), Job.worker_label.in_(sorted(resources.labels))),
    ]


def due(model: type[Leased], present: datetime) -> ColumnElement[bool]:
    """Return the condition for a queued row that may start; a row that waits for a retry starts from `not_before`."""
    return or_(model.not_before.is_(None), model.not_before <= present)


def abandoned(model: type[Leased], present: datetime) -> ColumnElement[bool]:
    """Return the condition for a row in work whose lease has expired and that another worker must take over.

    A row that was about to be paused does not start again; the sweep pauses it.
    """
    return and_(model.status.in_(model.HELD - {PAUSING}), model.lease_expires_at < present)


def free(model: type[Leased], present: datetime) -> ColumnElement[bool]:
    """Return the condition for a row that a worker may claim: it is queued and due, or its lease has expired."""
    return or_(and_(model.status == model.CLAIMABLE, due(model, present)), abandoned(model, present))


def waits(session: Session, model: LeasedModel, row_id: str) -> bool:
    """Return whether a worker with the requested resources could claim the row now."""
    return session.scalar(select(model.id).where(model.id == row_id, free(model, now(session)))) is not None


def draining(session: Session, resources: WorkerResources) -> bool:
    """Return whether this worker must claim no more rows. A worker that is not registered is not draining."""
    return resources.worker_id is not None and bool(
        session.scalar(select(Worker.draining).where(Worker.id == resources.worker_id))
    )


def next_id(
    session: Session,
    model: LeasedModel,
    resources: WorkerResources,
    *,
    max_attempts: float = math.inf,
    passed: Collection[str] = (),
) -> str | None:
    """Return the id of the next row for a worker with these resources, without those in `passed`; None: no row."""
    present = now(session)
    lost = _lost_id(session, model, resources, present, max_attempts, passed)
    return lost if lost is not None else _waiting_id(session, model, resources, present, passed)


def _lost_id(
    session: Session,
    model: Any,
    resources: WorkerResources,
    present: datetime,
    max_attempts: float,
    passed: Collection[str],
) -> str | None:
    statement = select(model.id).where(abandoned(model, present), *_satisfied(model, resources))
    if passed:
        statement = statement.where(model.id.not_in(passed))
    if max_attempts < math.inf:
        statement = statement.where(or_(model.failed_attempts + 1 < max_attempts, model.status == CANCELLING))
    priority = [Job.priority.desc()] if model is Job else []
    found: str | None = session.scalar(statement.order_by(*priority, model.created_at, model.id).limit(1))
    return found


def _waiting_id(
    session: Session, model: Any, resources: WorkerResources, present: datetime, passed: Collection[str]
) -> str | None:
    priority = [Job.priority.desc()] if model is Job else []
    first = select(model.id).where(model.status == model.CLAIMABLE, model.tenant_id == Tenant.id)
    first = first.where(due(model, present), *_satisfied(model, resources))
    if passed:
        first = first.where(model.id.not_in(passed))
    first = first.order_by(*priority, model.created_at, model.id).limit(1).correlate(Tenant)
    firsts = session.execute(select(first.scalar_subquery(), served(model)).select_from(Tenant)).all()
    served_at = {row_id: at for row_id, at in firsts if row_id is not None}
    if len(served_at) <= 1:
        return next(iter(served_at), None)
    working = in_work(session, model)
    rank = [-Job.priority] if model is Job else []
    # By their ids and without a join: a planner that misjudges the number of tenants would read the whole table.
    rows = session.execute(select(*rank, model.tenant_id, model.created_at, model.id).where(model.id.in_(served_at)))

    def _turn(row: Any) -> tuple[Any, ...]:
        *rank, tenant_id, created_at, row_id = row
        last = served_at[row_id]
        return (*rank, working.get(tenant_id, 0), last is not None, last, created_at, row_id)

    return str(min(rows, key=_turn).id)


def in_work(session: Session, model: Any) -> dict[str, int]:
    """Return the number of rows in work of each tenant, by the tenant's id."""
    held = select(model.tenant_id, func.count().label("rows")).where(model.status.in_(model.HELD))
    return {row.tenant_id: row.rows for row in session.execute(held.group_by(model.tenant_id))}


def served(model: Any) -> Any:
    """Return the column `served_at` of a query on tenants: the start of the tenant's last row, null for none."""
    last = select(func.max(model.started_at)).where(model.tenant_id == Tenant.id)
    return last.correlate(Tenant).scalar_subquery().label("served_at")
