"""Queries on datasets, each limited to one tenant."""

from collections.abc import Sequence

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.assets import NAMED
from app.models import Dataset, Job


def of_tenant(tenant_id: str) -> Select[Dataset]:
    """Return the query for all of a tenant's datasets."""
    return select(Dataset).where(Dataset.tenant_id == tenant_id)


def find(session: Session, tenant_id: str, dataset_id: str) -> Dataset | None:
    """Return the tenant's dataset, or None."""
    return session.scalars(of_tenant(tenant_id).where(Dataset.id == dataset_id)).one_or_none()


def find_to_use(session: Session, tenant_id: str, dataset_id: str) -> Dataset | None:
    """Like `find`; nobody can delete the row before this transaction ends."""
    statement = of_tenant(tenant_id).where(Dataset.id == dataset_id)
    return session.scalars(statement.with_for_update(read=True, key_share=True)).one_or_none()


def find_to_delete(session: Session, tenant_id: str, dataset_id: str) -> Dataset | None:
    """Like `find`; nobody else can use the row before this transaction ends."""
    statement = of_tenant(tenant_id).where(Dataset.id == dataset_id)
    return session.scalars(statement.with_for_update()).one_or_none()


def jobs_using(session: Session, dataset_id: str) -> Sequence[str]:
    """Return the ids of the newest jobs that refer to the dataset, at most one more than an error message lists."""
    newest = select(Job.id).where(Job.dataset_id == dataset_id).order_by(Job.created_at.desc(), Job.id.desc())
    return session.scalars(newest.limit(NAMED + 1)).all()
