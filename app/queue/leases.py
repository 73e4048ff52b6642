"""Leases on rows: claim, renew, finish, give back, and find lost ones. The row is the truth, not the queue's message.

`app.queue.scheduling` chooses the next row. A claim is one conditional UPDATE that increments `attempt`, the fencing
token. Every write of a worker goes through `fenced`, which matches the attempt, so that a worker whose lease another
one has taken over changes nothing.
"""

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import and_, case, func, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from app.db import now, update_count
from app.models import LEASED, Checkpoint, Dataset, Job, JobEvent, Leased
from app.queue import scheduling
from app.queue.scheduling import WorkerResources
from app.states import CANCELLING, FAILED, PAUSED, PAUSING

Row = TypeVar("Row", Dataset, Checkpoint, Job)


class LeaseLost(Exception):
    """Another attempt holds the row, or the row has ended: this worker must stop and write nothing."""


def claim(session: Session, model: type[Row], row_id: str, *, owner: str, lease_s: float) -> Row | None:
    """Claim the row if it is queued and due, or if its lease has expired; return it, or None if neither holds.

    An expired lease counts as a failed attempt. A row that its worker gave back does not.
    """
    present = now(session)
    # Skips a row that another transaction is changing, rather than wait for that transaction.
    free = select(model.id).where(model.id == row_id, scheduling.free(model, present)).with_for_update(skip_locked=True)
    values: dict[str, Any] = {
        "attempt": model.attempt + 1,
        "failed_attempts": case(
            (model.status == model.CLAIMABLE, model.failed_attempts), else_=model.failed_attempts + 1
        ),
        "not_before": None,
        "lease_owner": owner,
        "lease_expires_at": present + timedelta(seconds=lease_s),
        "started_at": func.coalesce(model.started_at, present),
        # A job that was being cancelled when its worker was lost stays `cancelling`; its next worker ends it.
        "status": case((model.status == CANCELLING, CANCELLING), else_=model.CLAIMED),
    }
    if not update_count(session, update(model).where(model.id == free.scalar_subquery()).values(**values)):
        return None
    return session.get(model, row_id, populate_existing=True)


def claim_next(
    session: Session, model: type[Row], resources: WorkerResources, *, owner: str, lease_s: float, max_attempts: int
) -> Row | None:
    """Claim the next row for a worker with these resources; None if there is none, or the worker is draining.

    Skips rows that other workers claim at the same moment, and rows whose failed attempts have reached the limit: the
    sweep fails those.
    """
    if scheduling.draining(session, resources):
        return None
    passed: set[str] = set()
    while row_id := scheduling.next_id(session, model, resources, passed=passed, max_attempts=max_attempts):
        row = claim(session, model, row_id, owner=owner, lease_s=lease_s)
        if row is not None:
            return row
        passed.add(row_id)
    return None


def fenced(session: Session, row: Leased, **values: Any) -> None:
    """Update the row if this attempt still holds it, else raise `LeaseLost`.

    A finished row has no lease owner and therefore does not match.
    """
    model = type(row)
    mine = and_(model.id == row.id, model.attempt == row.attempt, model.lease_owner == row.lease_owner)
    if not update_count(session, update(model).where(mine).values(**values)):
        raise LeaseLost(f"{row.id}: attempt {row.attempt} no longer holds the lease")


def renew(session: Session, row: Row, *, lease_s: float) -> Row:
    """Extend the lease and return the row as it is now; its status may be `cancelling` or `pausing`.

    Raises `LeaseLost` if another attempt holds the row.
    """
    fenced(session, row, lease_expires_at=now(session) + timedelta(seconds=lease_s))
    fresh = session.get(type(row), row.id, populate_existing=True)
    if fresh is None:
        raise LeaseLost(f"{row.id} is gone")
    return fresh


def finish(session: Session, row: Leased, *, status: str, **values: Any) -> None:
    """Record the end and drop the lease in one fenced write."""
    fenced(session, row, status=status, finished_at=now(session), lease_expires_at=None, lease_owner=None, **values)


def give_back(session: Session, row: Leased, *, status: str, **values: Any) -> None:
    """Release a row that has not ended, in one fenced write; if it is queued, the sweep sends its message."""
    fenced(session, row, status=status, lease_expires_at=None, lease_owner=None, enqueued_at=None, **values)


def find_lost(
    session: Session, *, redeliver_s: float, max_attempts: int, untaken: Collection[str] = ()
) -> list[tuple[type[Leased], str]]:
    """Return the rows whose message must be sent again, and end those that no worker needs to see.

    Lost rows are: queued rows that are due and whose last message is older than `redeliver_s`, and held rows whose
    lease has expired. Of the latter, this function fails those that have used all attempts, and pauses those that were
    about to be paused. It may run anywhere at any time: a row that is found twice is still claimed once.

    Args:
        untaken: queues that hold messages which no worker has taken. Their workers are busy and will find the rows when
            they become free, so no row of these queues is returned: the messages would only accumulate.
    """
    present = now(session)
    lost: list[tuple[type[Leased], str]] = []
    for model in LEASED:
        _settle_lost(session, model, present, max_attempts)
        if model.QUEUE in untaken:
            continue
        expired = scheduling.abandoned(model, present)
        stale = or_(model.enqueued_at.is_(None), model.enqueued_at < present - timedelta(seconds=redeliver_s))
        # A message from before the end of the lease is the one that led to it, so the next one is due at once.
        unanswered = or_(stale, model.enqueued_at < model.lease_expires_at)
        unsent = and_(model.status == model.CLAIMABLE, scheduling.due(model, present), stale)
        found = select(model.id).where(or_(unsent, and_(expired, unanswered))).limit(1000)
        ids = session.scalars(found).all()
        if ids:
            update_count(session, update(model).where(model.id.in_(ids)).values(enqueued_at=present))
        lost.extend((model, row_id) for row_id in ids)
    return lost


def _settle_lost(session: Session, model: type[Leased], present: datetime, max_attempts: int) -> None:
    """Fail the rows whose lease expired in their last attempt, and pause those that were about to be paused."""
    failed_attempts = model.failed_attempts + 1
    released: dict[str, Any] = {"lease_owner": None, "lease_expires_at": None, "failed_attempts": failed_attempts}
    expired = update(model).where(model.status.in_(model.HELD), model.lease_expires_at < present).returning(model.id)
    paused = expired.where(model.status == PAUSING).values(status=PAUSED, **released)
    _change(
        session,
        model,
        paused,
        "info",
        "paused",
        "the worker was lost; the job is paused at its last training checkpoint",
    )
    failure = {
        "class": "infra",
        "code": "attempts_exhausted",
        "detail": f"{max_attempts} attempts in a row failed or lost their worker, without a new training checkpoint "
        "between them; the last one reported no reason: read the workers' logs, check whether the run needs more "
        "memory or disk than its machine has, and retry",
    }
    given_up = expired.where(failed_attempts >= max_attempts, model.status.not_in((CANCELLING, PAUSING)))
    given_up = given_up.values(status=FAILED, finished_at=present, failure=failure, **released)
    message = f"infra failure {failure['code']}: {failure['detail']}"
    _change(session, model, given_up, "error", "failed", message)


def _change(
    session: Session, model: type[Leased], change: ReturningUpdate[Any], level: str, code: str, message: str
) -> None:
    """Make the change, and add an event to each job that it changes."""
    ids = session.scalars(change, execution_options={"synchronize_session": False}).all()
    if model is Job:
        session.add_all(JobEvent(job_id=row_id, level=level, code=code, message=message) for row_id in ids)
        session.flush()
