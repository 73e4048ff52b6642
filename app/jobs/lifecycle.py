"""Changes of a job's state by its owner: pause, resume, cancel, retry.

Each change happens under a lock on the row. The worker that holds the row sees the new state at its next poll (every
two seconds), makes its run save, and releases the row. Repeating a request changes nothing.
"""

from typing import Any

from sqlalchemy.orm import Session

from app import assets
from app.checkpoints import repository as checkpoints
from app.checkpoints.service import named
from app.db import after_commit, now
from app.errors import Conflict
from app.http.auth import Caller
from app.http.uploads import discard
from app.jobs import repository
from app.jobs.schemas import RetryFrom
from app.models import Job
from app.queue.messages import Queue
from app.settings import Settings
from app.states import (
    CANCELLED,
    CANCELLING,
    FAILED,
    JOB_MOVES,
    PAUSED,
    PAUSING,
    PREPARING,
    QUEUED,
    RUNNING,
    check_move,
)
from app.storage import Storage
from app.usage import quotas

AT_REST = frozenset({QUEUED, PAUSED})
"""States of jobs that have not ended and that no worker holds."""


def _locked(session: Session, caller: Caller, job_id: str) -> Job:
    return assets.found(repository.find_locked(session, caller.tenant_id, assets.checked_id(job_id)), job_id)


def _move(session: Session, row: Job, wanted: str, code: str, message: str, **values: Any) -> Job:
    check_move(JOB_MOVES, row.status, wanted, what=row.id)
    moved = repository.move(session, row, wanted, **values)
    assert moved, "the row is locked, or SQLite's one writer is us"
    repository.add_event(session, row, code, message)
    session.refresh(row)
    return row


def cancel(session: Session, caller: Caller, job_id: str) -> Job:
    """Cancel a job: one that no worker holds ends at once, a running one saves its work first.

    Repeating it changes nothing. Raises `NotFound`, and `Conflict` for a job that has ended.
    """
    row = _locked(session, caller, job_id)
    if row.status == CANCELLING:
        return row
    if row.status in AT_REST:
        message = "the job was cancelled before a worker ran it"
        return _move(session, row, CANCELLED, "cancelled", message, finished_at=now(session), not_before=None)
    return _move(session, row, CANCELLING, "cancelling", "the job is being cancelled; its run saves its work first")


def pause(session: Session, caller: Caller, job_id: str) -> Job:
    """Pause a job: a queued one is paused at once, a running one saves a checkpoint first and releases its worker.

    Repeating it changes nothing. Raises `NotFound`, and `Conflict` for a job that has ended or is being cancelled.
    """
    row = _locked(session, caller, job_id)
    if row.status in (PAUSING, PAUSED):
        return row
    if row.status == QUEUED:
        return _move(session, row, PAUSED, "paused", "the job was paused while it was queued", not_before=None)
    return _move(session, row, PAUSING, "pausing", "the job is being paused; its run saves a checkpoint first")


def resume(session: Session, caller: Caller, job_id: str, *, queue: Queue, settings: Settings) -> Job:
    """Queue a paused job again, to continue from its last checkpoint. A queued or running job stays as it is.

    Raises `NotFound`, `QuotaBusy`, and `Conflict` for a job that is still saving, is being cancelled or has ended.
    """
    row = _locked(session, caller, job_id)
    if row.status in (QUEUED, PREPARING, RUNNING):
        return row
    if row.status == PAUSING:
        raise Conflict(f"{row.id} is pausing and has not saved its checkpoint yet; resume it once it is paused")
    if row.status in (FAILED, CANCELLED):
        raise Conflict(f"{row.id} is {row.status}, not paused; use POST /v1/jobs/{row.id}/retry for another attempt")
    note = ("unpaused", "the job was resumed and waits for a worker")
    return _queue_again(session, row, note, queue=queue, settings=settings)


def retry(
    session: Session,
    caller: Caller,
    job_id: str,
    start: RetryFrom | None,
    *,
    queue: Queue,
    storage: Storage,
    settings: Settings,
) -> Job:
    """Queue a job that failed or was cancelled again, with its count of lost attempts reset.

    `start` None: from the last training checkpoint if there is one. `beginning` deletes the metrics, the evaluations
    and the service's adjustments; the events stay.

    Raises `NotFound`, `QuotaBusy`, and `Conflict` for a job in another state (`conflict`), without a training
    checkpoint (`no_checkpoint`), or whose spec refers to a deleted checkpoint (`checkpoint_not_found`).
    """
    row = _locked(session, caller, job_id)
    if row.status not in (FAILED, CANCELLED):
        raise Conflict(f"{row.id} is {row.status}; only a job that failed or was cancelled can be retried")
    if start == "checkpoint" and row.resume_key is None:
        raise Conflict(
            f"{row.id} has no training checkpoint: it ended before its first one, or retention deleted it; "
            'use {"from": "beginning"}',
            code="no_checkpoint",
        )
    for checkpoint_id in named(row.spec):
        if checkpoints.find_to_use(session, caller.tenant_id, checkpoint_id) is None:
            raise Conflict(
                f"the job's spec refers to {checkpoint_id}, which was deleted; submit a job with another checkpoint",
                code="checkpoint_not_found",
            )
    values: dict[str, Any] = {
        "failure": None,
        "results": None,
        "started_at": None,
        "finished_at": None,
        "not_before": None,
        "failed_attempts": 0,
        "progress": row.progress and {**row.progress, "eta_s": None, "images_per_s": None},
    }
    again = start != "beginning" and row.resume_key is not None
    if not again:
        values |= {"resume_key": None, "progress": None, "adjustments": None}
        repository.delete_history(session, row)
        if (key := row.resume_key) is not None:
            after_commit(session, lambda: discard(storage, key))
    where = "from its last training checkpoint" if again else "from the beginning"
    note = ("retried", f"the job is retried {where} and waits for a worker")
    return _queue_again(session, row, note, queue=queue, settings=settings, **values)


def _queue_again(
    session: Session, row: Job, note: tuple[str, str], *, queue: Queue, settings: Settings, **values: Any
) -> Job:
    """Queue the job, within the tenant's quota of queued jobs. `note` is the event's code and message.

    Raises `Conflict`, `QuotaBusy`.
    """
    check_move(JOB_MOVES, row.status, QUEUED, what=row.id)
    quotas.check(session, settings, row.tenant_id, "queued_jobs")
    _move(session, row, QUEUED, *note, **values)
    queue.enqueue(session, row)
    session.flush()
    return row
