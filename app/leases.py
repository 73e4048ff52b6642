"""Who works on a row: claim, renew, give up, sweep. The row is the truth; a queue message only wakes somebody up.

`app.scheduling` says which row is next. A claim is one conditional UPDATE. It raises `attempt`, and that number is the
fencing token: everything a worker writes goes through `fenced`, which matches the attempt, so that a worker whose
lease was taken over changes nothing.
"""

from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import and_, case, func, or_, select, update
from sqlalchemy.orm import Session

from app import scheduling
from app.db import update_count, utcnow
from app.models import Checkpoint, Dataset, Job, Leased
from app.scheduling import Offer
from app.states import CANCELLING, FAILED

LEASED: tuple[type[Dataset] | type[Checkpoint] | type[Job], ...] = (Dataset, Checkpoint, Job)
Row = TypeVar("Row", Dataset, Checkpoint, Job)


class LeaseLost(Exception):
    """Another claim holds the row, or it has ended: this worker must stop and write nothing."""


def claim(session: Session, model: type[Row], row_id: str, *, owner: str, lease_s: float) -> Row | None:
    """Claim the row if it is queued, or if its lease has expired; return it, or None if it is not to be had."""
    now = utcnow()
    # A row that somebody else is just changing is passed over: nobody waits for another's transaction.
    free = select(model.id).where(model.id == row_id, scheduling.free(model, now)).with_for_update(skip_locked=True)
    values: dict[str, Any] = {
        "attempt": model.attempt + 1,
        "lease_owner": owner,
        "lease_expires_at": now + timedelta(seconds=lease_s),
        "started_at": func.coalesce(model.started_at, now),
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

    What others claim at the same moment is left to them. A row whose lost workers have used up its attempts is left
    to the sweep, which fails it.
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
    """Extend the lease and return the row as it is now (its status may say `cancelling`).

    Raises `LeaseLost` if another attempt holds the row.
    """
    fenced(session, row, lease_expires_at=utcnow() + timedelta(seconds=lease_s))
    fresh = session.get(type(row), row.id, populate_existing=True)
    if fresh is None:
        raise LeaseLost(f"{row.id} is gone")
    return fresh


def finish(session: Session, row: Leased, *, status: str, **values: Any) -> None:
    """Record the end and drop the lease in one fenced write."""
    fenced(session, row, status=status, finished_at=utcnow(), lease_expires_at=None, lease_owner=None, **values)


def find_lost(session: Session, *, redeliver_s: float, max_attempts: int) -> list[tuple[type[Leased], str]]:
    """Return the rows whose message must be sent (again), and fail those that have used up their attempts.

    Lost are: queued rows whose last message is older than `redeliver_s`, and held rows whose lease has expired. Safe
    to run anywhere at any time: a row that is found twice is claimed once.
    """
    now = utcnow()
    lost: list[tuple[type[Leased], str]] = []
    for model in LEASED:
        expired = and_(model.status.in_(model.HELD), model.lease_expires_at < now)
        exhausted = update(model).where(expired, model.attempt >= max_attempts, model.status != CANCELLING)
        update_count(
            session,
            exhausted.values(
                status=FAILED,
                finished_at=now,
                lease_owner=None,
                lease_expires_at=None,
                failure={
                    "class": "infra",
                    "code": "attempts_exhausted",
                    "detail": f"its worker was lost {max_attempts} times; the last one gave no reason",
                },
            ),
        )
        stale = or_(model.enqueued_at.is_(None), model.enqueued_at < now - timedelta(seconds=redeliver_s))
        # A message sent before the lease ended was the one that led to it, so the first new one goes out at once.
        unanswered = or_(stale, model.enqueued_at < model.lease_expires_at)
        unsent = and_(model.status == model.CLAIMABLE, stale)
        found = select(model.id).where(or_(unsent, and_(expired, unanswered))).limit(1000)
        ids = session.scalars(found).all()
        if ids:
            update_count(session, update(model).where(model.id.in_(ids)).values(enqueued_at=now))
        lost.extend((model, row_id) for row_id in ids)
    return lost
