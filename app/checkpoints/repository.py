"""Queries on checkpoints, each limited to one tenant."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, or_, select, update
from sqlalchemy.orm import Session

from app.db import update_count
from app.models import Checkpoint, Job


def of_tenant(tenant_id: str) -> Select[Checkpoint]:
    """Return the query for all of a tenant's checkpoints."""
    return select(Checkpoint).where(Checkpoint.tenant_id == tenant_id)


def find(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint | None:
    """Return the tenant's checkpoint, or None."""
    return session.scalars(of_tenant(tenant_id).where(Checkpoint.id == checkpoint_id)).one_or_none()


def find_to_use(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint | None:
    """Like `find`; nobody can delete the row before this transaction ends."""
    statement = of_tenant(tenant_id).where(Checkpoint.id == checkpoint_id)
    return session.scalars(statement.with_for_update(read=True, key_share=True)).one_or_none()


def find_to_delete(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint | None:
    """Like `find`; nobody else can use the row before this transaction ends."""
    statement = of_tenant(tenant_id).where(Checkpoint.id == checkpoint_id)
    return session.scalars(statement.with_for_update()).one_or_none()


NAMED_AT = (("teacher", "id"), ("teacher", "initial_weights"), ("student", "initial_weights"))
"""The places in a job's spec that may name a checkpoint."""


def jobs_using(
    session: Session, tenant_id: str, checkpoint_ids: Sequence[str], *which: ColumnElement[bool]
) -> Sequence[tuple[str, dict[str, Any]]]:
    """Return (id, spec) of the tenant's jobs, limited by `which`, whose spec names one of the checkpoints."""
    named = or_(*(Job.spec[path].as_string().in_(checkpoint_ids) for path in NAMED_AT))
    statement = select(Job.id, Job.spec).where(Job.tenant_id == tenant_id, *which, named)
    return [(job_id, spec) for job_id, spec in session.execute(statement)]


def note_download(session: Session, checkpoint_id: str, moment: datetime) -> None:
    """Record when the checkpoint was downloaded."""
    update_count(session, update(Checkpoint).where(Checkpoint.id == checkpoint_id).values(downloaded_at=moment))
