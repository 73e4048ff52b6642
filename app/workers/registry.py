"""The registry of workers: heartbeats, which workers are present, and removing those that are gone."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy.orm import Session

from app.db import now
from app.models import Worker
from app.settings import Settings
from app.workers import repository


def beat(session: Session, worker: Worker, *, draining: bool = False) -> None:
    """Record this worker's heartbeat, and register it if it is not registered (any more).

    `draining` sets the flag, False leaves it as the operator or the worker set it before.
    """
    row = session.get(Worker, worker.id)
    if row is None:
        columns = {column.key: getattr(worker, column.key) for column in Worker.__table__.c if column.key != "draining"}
        session.add(row := Worker(**columns))
    row.seen_at = now(session)
    if draining:
        row.draining = True


def present(session: Session, settings: Settings, *, queue: str) -> Sequence[Worker]:
    """Return the workers that take rows of this queue: not draining, with a heartbeat at most `lease_s` old."""
    rows = repository.seen_since(session, now(session) - timedelta(seconds=settings.lease_s))
    return [row for row in rows if queue in row.queues and not row.draining]


def forget_silent(session: Session, settings: Settings) -> int:
    """Delete workers whose last heartbeat is older than `worker_silent_s`; return their number."""
    return repository.forget_silent(session, now(session) - timedelta(seconds=settings.worker_silent_s))
