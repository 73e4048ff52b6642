"""What datasets and checkpoints share: ids, and content that is uploaded once."""

import re
from collections.abc import Sequence
from typing import Final, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db import Database, update_count
from app.errors import Conflict, NotFound, ServiceError
from app.http.auth import Caller
from app.http.uploads import Part, announced_length, discard, receive, store
from app.models import Checkpoint, Dataset, Job
from app.queue.messages import Queue
from app.settings import Settings
from app.states import AWAITING_UPLOAD, QUEUED
from app.storage import Storage
from app.usage import quotas

Asset = TypeVar("Asset", Dataset, Checkpoint)
Owned = TypeVar("Owned", Dataset, Checkpoint, Job)

NAMED: Final = 5
"""How many job ids an error message lists."""

_ID = re.compile(r"[a-z]{2,8}_[0-9a-z]{1,30}")


def checked_id(row_id: str) -> str:
    """Return the id if it is well-formed, so that only such ids reach the database. Raises `NotFound`."""
    if not _ID.fullmatch(row_id):
        raise NotFound(f"{row_id[:80]!r} is not an id: an id looks like ds_…, ckpt_… or job_…")
    return row_id


def found(row: Owned | None, row_id: str) -> Owned:
    """Return the row. Raises `NotFound` if there is none; a row of another tenant gets the same answer."""
    if row is None:
        raise NotFound(f"there is no {row_id}")
    return row


def listed(jobs: Sequence[str]) -> str:
    """Return the first `NAMED` of the jobs' ids as text for an error message."""
    more = " and more" if len(jobs) > NAMED else ""
    return f"{', '.join(jobs[:NAMED])}{more}"


def _waiting(session: Session, caller: Caller, model: type[Asset], row_id: str) -> Asset:
    mine = select(model).where(model.id == checked_id(row_id), model.tenant_id == caller.tenant_id)
    row = found(session.scalars(mine).one_or_none(), row_id)
    if row.status != AWAITING_UPLOAD:
        raise _taken(row_id, row.status)
    return row


def _taken(row_id: str, status: str) -> Conflict:
    return Conflict(f"{row_id} is {status}: it has its content already; create another one for other content")


async def upload(
    request: Request,
    caller: Caller,
    model: type[Asset],
    row_id: str,
    *,
    database: Database,
    storage: Storage,
    queue: Queue,
    settings: Settings,
) -> Asset:
    """Store the request's body as the content of a row that awaits it, and queue its check.

    Raises `NotFound`; `Conflict` if the row has its content, also if a concurrent upload was faster; `QuotaExceeded`;
    and what `app.http.uploads.receive` raises. After these the row still awaits its content, except after `Conflict`.
    """

    def _check() -> None:
        with database.read() as session:
            _waiting(session, caller, model, row_id)
            length = announced_length(request, settings.max_upload_bytes)
            quotas.check(session, settings, caller.tenant_id, "storage_bytes", more=length or 1)

    def _keep(part: Part) -> Asset:
        key = store(storage, f"{model.__tablename__}/{row_id}", part)
        try:
            with database.write() as session:
                quotas.check(session, settings, caller.tenant_id, "storage_bytes", more=part.size_bytes)
                return _attach(session, caller, model, row_id, key, part.size_bytes, queue)
        except ServiceError:
            # A concurrent upload was faster, or the quota is used up. After any other error the transaction may have
            # been committed all the same, and then the row refers to this object.
            discard(storage, key)
            raise

    await run_in_threadpool(_check)
    async with receive(request, settings) as part:
        return await run_in_threadpool(_keep, part)


def _attach(
    session: Session, caller: Caller, model: type[Asset], row_id: str, key: str, size_bytes: int, queue: Queue
) -> Asset:
    mine = (model.id == row_id, model.tenant_id == caller.tenant_id, model.status == AWAITING_UPLOAD)
    values = {"status": QUEUED, "upload_key": key, "upload_bytes": size_bytes}
    if not update_count(session, update(model).where(*mine).values(**values)):
        raise _taken(row_id, "no longer awaiting_upload")
    row = session.get_one(model, row_id)
    queue.enqueue(session, row)
    return row
