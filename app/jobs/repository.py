"""Queries on jobs and what they log, each limited to one tenant, or to a job that the caller found by its tenant."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, delete, select, update
from sqlalchemy.orm import Session

from app.db import update_count
from app.models import Job, JobEvaluation, JobEvent, JobMetric


def of_tenant(
    tenant_id: str, *, status: str | None = None, dataset_id: str | None = None, name: str | None = None
) -> Select[Job]:
    """Return the query for a tenant's jobs; `name` is any part of the name, ignoring case."""
    statement = select(Job).where(Job.tenant_id == tenant_id)
    if status is not None:
        statement = statement.where(Job.status == status)
    if dataset_id is not None:
        statement = statement.where(Job.dataset_id == dataset_id)
    if name is not None:
        statement = statement.where(Job.name.icontains(name, autoescape=True))
    return statement


def find(session: Session, tenant_id: str, job_id: str) -> Job | None:
    """Return the tenant's job, or None."""
    return session.scalars(of_tenant(tenant_id).where(Job.id == job_id)).one_or_none()


def find_locked(session: Session, tenant_id: str, job_id: str) -> Job | None:
    """Like `find`; nobody else can change the row before this transaction ends."""
    return session.scalars(of_tenant(tenant_id).where(Job.id == job_id).with_for_update()).one_or_none()


def move(session: Session, job: Job, status: str, **values: Any) -> bool:
    """Set the job's status if it still has the one that was read; return whether it had."""
    statement = update(Job).where(Job.id == job.id, Job.status == job.status)
    return bool(update_count(session, statement.values(status=status, **values)))


def delete_history(session: Session, job: Job) -> None:
    """Delete the job's metrics and evaluations; its events stay."""
    for model in (JobMetric, JobEvaluation):
        session.execute(delete(model).where(model.job_id == job.id))


def add_event(session: Session, job: Job, code: str, message: str) -> None:
    """Add an event of level info to a job."""
    session.add(JobEvent(job_id=job.id, level="info", code=code, message=message))


def events(session: Session, job_id: str, *, after: int, limit: int) -> Sequence[JobEvent]:
    """Return a job's events after the one with number `after`, oldest first."""
    statement = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
    return session.scalars(statement.order_by(JobEvent.id).limit(limit)).all()


def metrics(session: Session, job_id: str, *, subject: str, after_step: int, limit: int) -> Sequence[JobMetric]:
    """Return a job's metrics of one subject after a step, by step."""
    statement = select(JobMetric).where(
        JobMetric.job_id == job_id, JobMetric.subject == subject, JobMetric.step > after_step
    )
    return session.scalars(statement.order_by(JobMetric.step).limit(limit)).all()


def evaluations(session: Session, job_id: str) -> Sequence[JobEvaluation]:
    """Return a job's evaluations, by epoch, the teacher's last."""
    statement = select(JobEvaluation).where(JobEvaluation.job_id == job_id)
    return session.scalars(statement.order_by(JobEvaluation.epoch, JobEvaluation.subject)).all()
