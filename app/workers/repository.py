"""Queries on workers and the rows that they hold."""

from collections.abc import Sequence
from datetime import datetime
from typing import cast

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.db import update_count
from app.models import LEASED, Leased, Worker


def all_workers(session: Session) -> Sequence[Worker]:
    """Return every registered worker, by name."""
    return session.scalars(select(Worker).order_by(Worker.name, Worker.started_at, Worker.id)).all()


def seen_since(session: Session, moment: datetime) -> Sequence[Worker]:
    """Return the workers whose last heartbeat is at `moment` or later."""
    return session.scalars(select(Worker).where(Worker.seen_at >= moment)).all()


def held_rows(session: Session) -> dict[str, Leased]:
    """Return the row that each worker holds, by the worker's id."""
    held: dict[str, Leased] = {}
    for model in LEASED:
        mine = select(model).where(model.status.in_(model.HELD), model.lease_owner.is_not(None))
        rows = cast(Sequence[Leased], session.scalars(mine).all())
        held |= {worker_of(row): row for row in rows}
    return held


def worker_of(row: Leased) -> str:
    """Return the id of the worker that holds the row: a lease's owner is `<worker's id>/<host>:<process>`."""
    return (row.lease_owner or "").partition("/")[0]


def set_draining(session: Session, name: str, draining: bool) -> int:
    """Set whether the workers of this name are draining (take no new rows); return their number."""
    return update_count(session, update(Worker).where(Worker.name == name).values(draining=draining))


def forget(session: Session, worker_id: str) -> None:
    """Delete a worker."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def forget_silent(session: Session, before: datetime) -> int:
    """Delete the workers whose last heartbeat is before `before`; return their number."""
    return update_count(session, delete(Worker).where(Worker.seen_at < before))
