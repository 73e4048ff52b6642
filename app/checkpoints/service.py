"""Checkpoints: creating, reading, downloading and deleting them."""

from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import assets
from app.checkpoints import repository
from app.checkpoints.schemas import CheckpointCreate
from app.db import Database, after_commit, utcnow
from app.errors import Conflict
from app.http.auth import Caller
from app.http.uploads import discard_prefix
from app.ids import new_id
from app.logs import first_line
from app.models import Checkpoint, Job
from app.request_models import invalid
from app.settings import Settings
from app.specs.catalog import Catalog
from app.specs.validation import check_detector
from app.states import AWAITING_UPLOAD, CHECKING, JOB_TERMINAL, READY
from app.storage import Storage
from app.usage import quotas

log = structlog.get_logger()

NOTED_EVERY = timedelta(hours=1)


class CheckpointInUse(Conflict):
    """A job that has not ended refers to the checkpoint."""

    code, title = "checkpoint_in_use", "Checkpoint in use"


class CheckpointNotReady(Conflict):
    """The checkpoint has no usable weights yet, or its check failed."""

    code, title = "checkpoint_not_ready", "Checkpoint not ready"


def create(
    session: Session, caller: Caller, body: CheckpointCreate, catalog: Catalog, settings: Settings
) -> Checkpoint:
    """Create a checkpoint that awaits its weights.

    Raises `Invalid` for a detector that is not in the catalog, `QuotaBusy`.
    """
    detector = None
    if body.detector is not None:
        section = check_detector(catalog, body.detector, ("detector",))
        if section.problems:
            raise invalid(section.problems)
        detector = section.value
    quotas.check(session, settings, caller.tenant_id, "uploads")
    row = Checkpoint(
        id=new_id("ckpt"),
        tenant_id=caller.tenant_id,
        name=body.name,
        status=AWAITING_UPLOAD,
        detector=detector,
        classes=body.classes,
        attempt=0,
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, caller: Caller, checkpoint_id: str) -> Checkpoint:
    """Return the caller's checkpoint. Raises `NotFound`."""
    row = repository.find(session, caller.tenant_id, assets.checked_id(checkpoint_id))
    return assets.found(row, checkpoint_id)


def get_ready(session: Session, caller: Caller, checkpoint_id: str) -> Checkpoint:
    """Return the caller's checkpoint with its weights. Raises `NotFound`, `CheckpointNotReady`."""
    row = get(session, caller, checkpoint_id)
    if row.status != READY or row.storage_key is None:
        raise CheckpointNotReady(not_ready(row))
    return row


def note_download(database: Database, row: Checkpoint) -> None:
    """Record the time of a download, once an hour at most: retention keeps what was downloaded recently."""
    moment = utcnow()
    if row.downloaded_at is not None and moment - row.downloaded_at < NOTED_EVERY:
        return
    try:
        with database.write() as session:
            repository.note_download(session, row.id, moment)
    except SQLAlchemyError as error:
        # A full disk must not prevent downloads.
        log.warning("download_not_noted", row=row.id, error=first_line(error))


def not_ready(row: Checkpoint) -> str:
    """Return why a checkpoint cannot be used, and the remedy."""
    if row.failure:
        return f"{row.id} is {row.status}: {row.failure.get('detail')}"
    hint = "upload its weights first" if row.status == AWAITING_UPLOAD else "wait until it is ready"
    return f"{row.id} is {row.status}; {hint}"


def named(spec: dict[str, Any]) -> list[str]:
    """Return the ids of the checkpoints that a job's spec refers to."""
    given = ((spec.get(part) or {}).get(key) for part, key in repository.NAMED_AT)
    return [value for value in given if value is not None and value.startswith("ckpt_")]


def delete(session: Session, caller: Caller, checkpoint_id: str, storage: Storage) -> None:
    """Delete the checkpoint, and its weights after the commit.

    Raises `NotFound`; `CheckpointInUse` while a job that has not ended refers to it; `Conflict` during its check.
    """
    row = repository.find_to_delete(session, caller.tenant_id, assets.checked_id(checkpoint_id))
    row = assets.found(row, checkpoint_id)
    open_jobs = Job.status.not_in(JOB_TERMINAL)
    if jobs := [job for job, _ in repository.jobs_using(session, caller.tenant_id, [row.id], open_jobs)]:
        raise CheckpointInUse(
            f"{row.id} is used by jobs that have not ended: {assets.listed(jobs)}; cancel them or wait until they end"
        )
    if row.status == CHECKING:
        raise Conflict(f"{row.id} is being checked; delete it once the check has ended")
    session.delete(row)
    after_commit(session, lambda: discard_prefix(storage, f"checkpoints/{checkpoint_id}"))
