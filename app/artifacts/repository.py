"""Queries on artifacts. The caller has found the job by its tenant."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.models import Artifact


def of_job(session: Session, job_id: str) -> Sequence[Artifact]:
    """Return all of a job's artifacts, by name."""
    return session.scalars(select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.name)).all()


def find(session: Session, job_id: str, name: str) -> Artifact | None:
    """Return the job's artifact of this name, or None."""
    return session.scalars(select(Artifact).where(Artifact.job_id == job_id, Artifact.name == name)).one_or_none()
