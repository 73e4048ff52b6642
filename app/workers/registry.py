"""Which workers there are: how one makes itself known, when it counts as present, and when it is forgotten."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy.orm import Session

from app.db import now
from app.models import Worker
from app.settings import Settings
from app.workers import repository


def beat(session: Session, worker: Worker, *, draining: bool = False) -> None:
    """Say that this worker is there, and whether it drains by its own will.

    One that was forgotten while the database was away is known again. What the operator has set stays.
    """
    row = session.get(Worker, worker.id)
    if row is None:
        columns = {column.key: getattr(worker, column.key) for column in Worker.__table__.c if column.key != "draining"}
        session.add(row := Worker(**columns))
    row.seen_at = now(session)
    if draining:
        row.draining = True


def present(session: Session, settings: Settings, *, queue: str) -> Sequence[Worker]:
    """Return the workers that take rows of this queue now: heard of within a lease's time, and not draining."""
    rows = repository.seen_since(session, now(session) - timedelta(seconds=settings.lease_s))
    return [row for row in rows if queue in row.queues and not row.draining]


def forget_silent(session: Session, settings: Settings) -> int:
    """Delete workers that were not heard of for long; return how many there were."""
    return repository.forget_silent(session, now(session) - timedelta(seconds=settings.worker_silent_s))
