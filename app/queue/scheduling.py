"""Which row is next. A message only wakes a worker up: what it then works on is chosen here, by the database.

First come rows whose worker was lost: they have had their turn. Then, of the rows that wait and whose demands the
worker meets: the highest priority; of these the tenant with the fewest rows in work, so that one tenant's hundred jobs
do not starve another's one; of these the tenant whose last row began the longest ago; then the oldest row. Datasets
and checkpoints have no priority and make no demands; the rest holds for them too.

Each tenant's first row comes from one probe of an index (`ix_jobs_next`), and when it was last served from another
(`ix_…_service`), so that the choice takes time by tenants and rows in work, not by rows that wait.
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
class Offer:
    """What a worker has for a job; the worker is None where it is not registered.

    Attributes:
        processes: the most `resources.gpus` that it takes.
        gpu_memory_gb: memory of its smallest GPU, GB; None: it has none.
        labels: what it is called in `resources.label`.
        worker_id: its row in the table of workers.
    """

    processes: int = 1
    gpu_memory_gb: float | None = None
    labels: frozenset[str] = frozenset()
    worker_id: str | None = None

    @classmethod
    def of(cls, worker: Worker) -> Self:
        """Return what a registered worker offers."""
        return cls(
            processes=worker.processes,
            gpu_memory_gb=worker.gpu_memory_gb,
            labels=frozenset(worker.labels),
            worker_id=worker.id,
        )

    def meets(self, gpus: int, gpu_memory_gb: float | None, label: str | None) -> bool:
        """Say whether a job that asks for this can run here; `_demands_met` says the same in SQL."""
        enough_memory = gpu_memory_gb is None or (self.gpu_memory_gb or 0) >= gpu_memory_gb
        return gpus <= self.processes and enough_memory and (label is None or label in self.labels)


def _demands_met(model: Any, offer: Offer) -> list[ColumnElement[bool]]:
    if model is not Job:
        return []
    memory = offer.gpu_memory_gb or 0
    return [
        Job.gpus <= offer.processes,
        or_(Job.gpu_memory_gb.is_(None), Job.gpu_memory_gb <= memory),
        or_(Job.worker_label.is_(None), Job.worker_label.in_(sorted(offer.labels))),
    ]


def due(model: type[Leased], present: datetime) -> ColumnElement[bool]:
    """Return what holds of a waiting row that may begin: one that is to be tried again later waits until then."""
    return or_(model.not_before.is_(None), model.not_before <= present)


def abandoned(model: type[Leased], present: datetime) -> ColumnElement[bool]:
    """Return what holds of a row in work whose lease has expired, and that another worker is to take over.

    One that was to be paused is not begun again: the sweep settles it.
    """
    return and_(model.status.in_(model.HELD - {PAUSING}), model.lease_expires_at < present)


def free(model: type[Leased], present: datetime) -> ColumnElement[bool]:
    """Return what holds of a row that may be claimed: it waits and may begin, or its lease has expired."""
    return or_(and_(model.status == model.CLAIMABLE, due(model, present)), abandoned(model, present))


def waits(session: Session, model: LeasedModel, row_id: str) -> bool:
    """Say whether the row may be claimed now by a worker that meets its demands."""
    return session.scalar(select(model.id).where(model.id == row_id, free(model, now(session)))) is not None


def draining(session: Session, offer: Offer) -> bool:
    """Say whether this worker is to take nothing new. One that is not registered, or not any more, is not draining."""
    return offer.worker_id is not None and bool(
        session.scalar(select(Worker.draining).where(Worker.id == offer.worker_id))
    )


def next_id(
    session: Session,
    model: LeasedModel,
    offer: Offer,
    *,
    max_attempts: float = math.inf,
    passed: Collection[str] = (),
) -> str | None:
    """Return the id of the row that a worker with this offer should work on next, leaving out `passed`."""
    present = now(session)
    lost = _lost_id(session, model, offer, present, max_attempts, passed)
    return lost if lost is not None else _waiting_id(session, model, offer, present, passed)


def _lost_id(
    session: Session, model: Any, offer: Offer, present: datetime, max_attempts: float, passed: Collection[str]
) -> str | None:
    statement = select(model.id).where(abandoned(model, present), *_demands_met(model, offer))
    if passed:
        statement = statement.where(model.id.not_in(passed))
    if max_attempts < math.inf:
        statement = statement.where(or_(model.losses + 1 < max_attempts, model.status == CANCELLING))
    priority = [Job.priority.desc()] if model is Job else []
    found: str | None = session.scalar(statement.order_by(*priority, model.created_at, model.id).limit(1))
    return found


def _waiting_id(session: Session, model: Any, offer: Offer, present: datetime, passed: Collection[str]) -> str | None:
    priority = [Job.priority.desc()] if model is Job else []
    first = select(model.id).where(model.status == model.CLAIMABLE, model.tenant_id == Tenant.id)
    first = first.where(due(model, present), *_demands_met(model, offer))
    if passed:
        first = first.where(model.id.not_in(passed))
    first = first.order_by(*priority, model.created_at, model.id).limit(1).correlate(Tenant)
    firsts = session.execute(select(first.scalar_subquery(), served(model)).select_from(Tenant)).all()
    served_at = {row_id: at for row_id, at in firsts if row_id is not None}
    if len(served_at) <= 1:
        return next(iter(served_at), None)
    working = in_work(session, model)
    rank = [-Job.priority] if model is Job else []
    # By their ids, not joined: a planner that guesses wrong at the number of tenants reads every row that there is.
    rows = session.execute(select(*rank, model.tenant_id, model.created_at, model.id).where(model.id.in_(served_at)))

    def _turn(row: Any) -> tuple[Any, ...]:
        *rank, tenant_id, created_at, row_id = row
        last = served_at[row_id]
        return (*rank, working.get(tenant_id, 0), last is not None, last, created_at, row_id)

    return str(min(rows, key=_turn).id)


def in_work(session: Session, model: Any) -> dict[str, int]:
    """Return how many rows of each tenant are in work, by the tenant's id."""
    held = select(model.tenant_id, func.count().label("rows")).where(model.status.in_(model.HELD))
    return {row.tenant_id: row.rows for row in session.execute(held.group_by(model.tenant_id))}


def served(model: Any) -> Any:
    """Return the column `served_at` of a query on tenants: when a row of the tenant last began, null for never."""
    last = select(func.max(model.started_at)).where(model.tenant_id == Tenant.id)
    return last.correlate(Tenant).scalar_subquery().label("served_at")
