"""Queries on one tenant's usage."""

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from app.models import Artifact, Checkpoint, Dataset, Job, Tenant
from app.states import AWAITING_UPLOAD, QUEUED


def limits_locked(session: Session, tenant_id: str) -> dict[str, int | None]:
    """Return the tenant's own limits, and lock them: other requests count only after this transaction ends."""
    # `key_share`: transactions that do not count may still insert rows that refer to the tenant.
    statement = select(Tenant.limits).where(Tenant.id == tenant_id).with_for_update(key_share=True)
    return session.scalar(statement) or {}


def limits(session: Session, tenant_id: str) -> dict[str, int | None]:
    """Return the tenant's own limits; for the others the settings apply."""
    return session.scalar(select(Tenant.limits).where(Tenant.id == tenant_id)) or {}


def _count(session: Session, model: type[Dataset] | type[Checkpoint] | type[Job], *which: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(model).where(*which)) or 0


def queued_jobs(session: Session, tenant_id: str) -> int:
    """Return the number of the tenant's queued jobs."""
    return _count(session, Job, Job.tenant_id == tenant_id, Job.status == QUEUED)


def datasets(session: Session, tenant_id: str) -> int:
    """Return the number of the tenant's datasets, in any state."""
    return _count(session, Dataset, Dataset.tenant_id == tenant_id)


def uploads(session: Session, tenant_id: str) -> int:
    """Return the number of the tenant's datasets and checkpoints that await their content or receive it."""
    models: tuple[type[Dataset] | type[Checkpoint], ...] = (Dataset, Checkpoint)
    return sum(
        _count(session, model, model.tenant_id == tenant_id, model.status == AWAITING_UPLOAD) for model in models
    )


def storage(session: Session, tenant_id: str) -> dict[str, int]:
    """Return the bytes that the tenant's objects use, by kind.

    Training checkpoints are not counted: they are temporary, and the tenant did not create them.
    """
    uploaded = sum(
        session.scalar(
            select(func.sum(model.upload_bytes)).where(model.tenant_id == tenant_id, model.upload_key.is_not(None))
        )
        or 0
        for model in (Dataset, Checkpoint)
    )
    artifacts = select(func.sum(Artifact.size_bytes)).join(Job, Artifact.job_id == Job.id)
    return {
        "uploads_bytes": int(uploaded),
        "datasets_bytes": int(
            session.scalar(select(func.sum(Dataset.size_bytes)).where(Dataset.tenant_id == tenant_id)) or 0
        ),
        "checkpoints_bytes": int(
            session.scalar(select(func.sum(Checkpoint.size_bytes)).where(Checkpoint.tenant_id == tenant_id)) or 0
        ),
        "artifacts_bytes": int(session.scalar(artifacts.where(Job.tenant_id == tenant_id)) or 0),
    }


def tenants(session: Session) -> list[Tenant]:
    """Return every tenant, by name."""
    return list(session.scalars(select(Tenant).order_by(Tenant.name)))
