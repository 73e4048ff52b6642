"""Queries on checkpoints, each limited to one tenant."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.models import Checkpoint, Job
from app.states import JOB_TERMINAL


def of_tenant(tenant_id: str) -> Select[Checkpoint]:
    """Return the query for all of a tenant's checkpoints."""
    return select(Checkpoint).where(Checkpoint.tenant_id == tenant_id)


def find(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint | None:
    """Return the tenant's checkpoint, if there is one of this id."""
    return session.scalars(of_tenant(tenant_id).where(Checkpoint.id == checkpoint_id)).one_or_none()


def find_to_use(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint | None:
    """As `find`, and the row cannot be deleted before this transaction ends."""
    statement = of_tenant(tenant_id).where(Checkpoint.id == checkpoint_id)
    return session.scalars(statement.with_for_update(read=True, key_share=True)).one_or_none()


def find_to_delete(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint | None:
    """As `find`, and nobody else can begin to use the row before this transaction ends."""
    statement = of_tenant(tenant_id).where(Checkpoint.id == checkpoint_id)
    return session.scalars(statement.with_for_update()).one_or_none()


def open_jobs(session: Session, tenant_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return (id, spec) of the tenant's jobs that have not ended."""
    statement = select(Job.id, Job.spec).where(Job.tenant_id == tenant_id, Job.status.not_in(JOB_TERMINAL))
    return ((job_id, spec) for job_id, spec in session.execute(statement))
