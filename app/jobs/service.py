"""Rules of jobs: how one is made and read. What may become of one is in `lifecycle`."""

import re
from typing import Any

from sqlalchemy.orm import Session

from app import assets
from app.auth import Caller
from app.catalog import Catalog
from app.ids import new_id
from app.jobs import repository
from app.jobs.resolve import resolve
from app.jobs.schemas import EVENT_PREFIX, EventOut, MetricOut, MetricsOut
from app.models import Job
from app.pagination import Page, bad_cursor
from app.queue import Queue
from app.settings import Settings
from app.states import QUEUED
from app.usage import quotas

_EVENT_ID = re.compile(rf"{EVENT_PREFIX}(\d{{1,18}})")


def create(
    session: Session, caller: Caller, body: dict[str, Any], catalog: Catalog, queue: Queue, settings: Settings
) -> Job:
    """Make a job and queue it.

    Raises `Invalid` with every mistake in the spec, `DatasetNotReady`, `CheckpointNotReady`, `QuotaBusy`,
    `QuotaExceeded`.
    """
    resolved = resolve(session, caller.tenant_id, catalog, body)
    for quota in ("queued_jobs", "storage_bytes"):
        quotas.check(session, settings, caller.tenant_id, quota)
    row = Job(
        id=new_id("job"),
        tenant_id=caller.tenant_id,
        name=resolved.spec["name"],
        status=QUEUED,
        attempt=0,
        dataset_id=resolved.dataset.id,
        spec=resolved.spec,
        labels=resolved.spec["labels"],
    )
    session.add(row)
    session.flush()
    repository.add_event(session, row, "created", "the job was created and waits for a worker")
    queue.enqueue(session, row)
    session.flush()
    return row


def get(session: Session, caller: Caller, job_id: str) -> Job:
    """Return the caller's job. Raises `NotFound`."""
    return assets.found(repository.find(session, caller.tenant_id, assets.checked_id(job_id)), job_id)


def list_events(session: Session, caller: Caller, job_id: str, *, after: str | None, limit: int) -> Page[EventOut]:
    """Return a job's events, oldest first. Raises `NotFound`, `Invalid` (`bad_cursor`)."""
    job = get(session, caller, job_id)
    number = 0
    if after is not None:
        found = _EVENT_ID.fullmatch(after)
        if not found:
            raise bad_cursor(after)
        number = int(found[1])
    rows = repository.events(session, job.id, after=number, limit=limit + 1)
    data = [EventOut.of(row) for row in rows[:limit]]
    more = len(rows) > limit
    return Page(data=data, has_more=more, next_cursor=data[-1].id if more else None)


def list_metrics(
    session: Session, caller: Caller, job_id: str, *, subject: str, after_step: int, limit: int
) -> MetricsOut:
    """Return what a job logged, by step. Raises `NotFound`."""
    job = get(session, caller, job_id)
    rows = repository.metrics(session, job.id, subject=subject, after_step=after_step, limit=limit + 1)
    return MetricsOut(data=[MetricOut.model_validate(row) for row in rows[:limit]], has_more=len(rows) > limit)
