"""Who works on a row: claim, renew, give up, sweep. The row is the truth; a queue message only wakes somebody up.

`app.queue.scheduling` says which row is next. A claim is one conditional UPDATE that raises `attempt`, the
fencing token: everything a worker writes goes through `fenced`, which matches the attempt, so that a worker whose lease
was taken over changes nothing.
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
from app.queue.scheduling import Offer
from app.states import CANCELLING, FAILED, PAUSED, PAUSING

Row = TypeVar("Row", Dataset, Checkpoint, Job)


class LeaseLost(Exception):
    """Another claim holds the row, or it has ended: this worker must stop and write nothing."""


def claim(session: Session, model: type[Row], row_id: str, *, owner: str, lease_s: float) -> Row | None:
    """Claim the row if it is queued and due, or if its lease has expired; return it, or None if it is not to be had.

    An expired lease is a loss, which counts towards the limit of attempts. A row that was handed back has lost nothing.
    """
    present = now(session)
    # A row that somebody else is just changing is passed over: nobody waits for another's transaction.
    free = select(model.id).where(model.id == row_id, scheduling.free(model, present)).with_for_update(skip_locked=True)
    values: dict[str, Any] = {
        "attempt": model.attempt + 1,
        "losses": case((model.status == model.CLAIMABLE, model.losses), else_=model.losses + 1),
        "not_before": None,
        "lease_owner": owner,
        "lease_expires_at": present + timedelta(seconds=lease_s),
        "started_at": func.coalesce(model.started_at, present),
        # A job that was being cancelled when its worker died stays `cancelling`: its next worker ends it.
        "status": case((model.status == CANCELLING, CANCELLING), else_=model.CLAIMED),
    }
    if not update_count(session, update(model).where(model.id == free.scalar_subquery()).values(**values)):
        return None
    return session.get(model, row_id, populate_existing=True)


def claim_next(
    session: Session, model: type[Row], offer: Offer, *, owner: str, lease_s: float, max_attempts: int
) -> Row | None:
    """Claim the row that is next for a worker with this offer; None if there is none, or the worker is draining.

    What others claim at the same moment is left to them. A row whose losses have reached the limit is left to the
    sweep, which fails it.
    """
    if scheduling.draining(session, offer):
        return None
    passed: set[str] = set()
    while (row_id := scheduling.next_id(session, model, offer, passed=passed, max_attempts=max_attempts)) is not None:
        row = claim(session, model, row_id, owner=owner, lease_s=lease_s)
        if row is not None:
            return row
        passed.add(row_id)
    return None


def fenced(session: Session, row: Leased, **values: Any) -> None:
    """Update the row if this attempt still holds it, else raise `LeaseLost`.

    A finished row has no lease owner, so it matches no more.
    """
    model = type(row)
    mine = and_(model.id == row.id, model.attempt == row.attempt, model.lease_owner == row.lease_owner)
    if not update_count(session, update(model).where(mine).values(**values)):
        raise LeaseLost(f"{row.id}: attempt {row.attempt} no longer holds the lease")


def renew(session: Session, row: Row, *, lease_s: float) -> Row:
    """Extend the lease and return the row as it is now (its status may say `cancelling` or `pausing`).

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
    """Let go of a row that has not ended, in one fenced write; where it is queued, the sweep sends its message."""
    fenced(session, row, status=status, lease_expires_at=None, lease_owner=None, enqueued_at=None, **values)


def find_lost(
    session: Session, *, redeliver_s: float, max_attempts: int, untaken: Collection[str] = ()
) -> list[tuple[type[Leased], str]]:
    """Return the rows whose message must be sent (again), and settle what no worker needs to see.

    Lost are: queued rows that may be claimed by now and whose last message is older than `redeliver_s`, and held rows
    whose lease has expired. Of the latter, those that have used up their attempts fail here, and those that were to be
    paused are paused. Safe to run anywhere at any time: a row that is found twice is claimed once.

    Of a queue in `untaken`, which holds messages that nobody has taken yet, no row is returned: its workers are busy,
    and one that comes free finds the rows by itself. Messages would only pile up.
    """
    present = now(session)
    lost: list[tuple[type[Leased], str]] = []
    for model in LEASED:
        _settle_lost(session, model, present, max_attempts)
        if model.QUEUE in untaken:
            continue
        expired = scheduling.abandoned(model, present)
        stale = or_(model.enqueued_at.is_(None), model.enqueued_at < present - timedelta(seconds=redeliver_s))
        # A message sent before the lease ended was the one that led to it, so the first new one goes out at once.
        unanswered = or_(stale, model.enqueued_at < model.lease_expires_at)
        unsent = and_(model.status == model.CLAIMABLE, scheduling.due(model, present), stale)
        found = select(model.id).where(or_(unsent, and_(expired, unanswered))).limit(1000)
        ids = session.scalars(found).all()
        if ids:
            update_count(session, update(model).where(model.id.in_(ids)).values(enqueued_at=present))
        lost.extend((model, row_id) for row_id in ids)
    return lost


def _settle_lost(session: Session, model: type[Leased], present: datetime, max_attempts: int) -> None:
    """Fail the rows whose lease has expired once too often, and pause those that were about to be."""
    released: dict[str, Any] = {"lease_owner": None, "lease_expires_at": None, "losses": model.losses + 1}
    expired = update(model).where(model.status.in_(model.HELD), model.lease_expires_at < present).returning(model.id)
    paused = expired.where(model.status == PAUSING).values(status=PAUSED, **released)
    _tell(session, model, paused, "info", "paused", "its worker was lost; the job is paused at its last checkpoint")
    failure = {
        "class": "infra",
        "code": "attempts_exhausted",
        "detail": f"its worker was lost or its machine failed {max_attempts} times with no new training checkpoint "
        "between; the last one gave no reason: look at the workers' logs, and whether the run takes more memory or "
        "disk than its machine has, then try it again",
    }
    given_up = expired.where(model.losses + 1 >= max_attempts, model.status.not_in((CANCELLING, PAUSING)))
    given_up = given_up.values(status=FAILED, finished_at=present, failure=failure, **released)
    message = f"infra failure {failure['code']}: {failure['detail']}"
    _tell(session, model, given_up, "error", "failed", message)


def _tell(session: Session, model: type[Leased], change: ReturningUpdate[Any], *note: str) -> None:
    """Make the change, and tell it in the events of the jobs that it touches: `note` is level, code and message."""
    ids = session.scalars(change, execution_options={"synchronize_session": False}).all()
    level, code, message = note
    if model is Job:
        session.add_all(JobEvent(job_id=row_id, level=level, code=code, message=message) for row_id in ids)
        session.flush()
