"""Artifacts: listing and finding a job's files."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.artifacts import repository
from app.errors import NotFound
from app.http.auth import Caller
from app.jobs import service as jobs
from app.models import Artifact


def list_all(session: Session, caller: Caller, job_id: str) -> Sequence[Artifact]:
    """Return the artifacts of the caller's job. Raises `NotFound`."""
    return repository.of_job(session, jobs.get(session, caller, job_id).id)


def get(session: Session, caller: Caller, job_id: str, name: str) -> Artifact:
    """Return one artifact of the caller's job. Raises `NotFound`."""
    job = jobs.get(session, caller, job_id)
    row = repository.find(session, job.id, name) if name.isprintable() and len(name) <= 200 else None
    if row is None:
        raise NotFound(f"{job.id} has no artifact {name[:200]!r}; GET /v1/jobs/{job.id}/artifacts lists them")
    return row
