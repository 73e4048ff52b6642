"""Workers: listing and draining them."""

from datetime import timedelta

from sqlalchemy.orm import Session

from app.db import now
from app.errors import NotFound
from app.http.auth import Caller
from app.settings import Settings
from app.workers import repository
from app.workers.schemas import WorkerOut, WorkingOn


def listed(session: Session, settings: Settings, caller: Caller) -> list[WorkerOut]:
    """Return every worker. `working_on` is only set for the caller's own rows."""
    held, silent_since = repository.held_rows(session), now(session) - timedelta(seconds=settings.lease_s)
    out = []
    for row in repository.all_workers(session):
        working = held.get(row.id)
        silent = row.seen_at < silent_since
        status = "silent" if silent else "draining" if row.draining else "busy" if working else "idle"
        shown = None
        if working is not None and working.tenant_id == caller.tenant_id:
            shown = WorkingOn(id=working.id, name=working.name, since=working.started_at)
        out.append(WorkerOut.of(row, status=status, busy=working is not None, working_on=shown))
    return out


def set_draining(session: Session, name: str, draining: bool) -> int:
    """Set whether the workers of this name are draining; return their number. Raises `NotFound`."""
    count = repository.set_draining(session, name, draining)
    if not count:
        known = ", ".join(sorted({row.name for row in repository.all_workers(session)})) or "none"
        raise NotFound(f"there is no worker {name!r}; the workers are: {known}")
    return count
