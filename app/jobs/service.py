"""Jobs: creating and reading them, and their priority. `lifecycle` has the changes of state."""

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from app import assets
from app.errors import Conflict, Forbidden
from app.http.auth import Caller
from app.http.pagination import Page, bad_cursor
from app.ids import new_id
from app.jobs import repository
from app.jobs.durations import recipe_of, workload_of
from app.jobs.resolve import resolve
from app.jobs.schemas import EVENT_PREFIX, EventOut, JobOut, MetricOut, MetricsOut
from app.jobs.waiting import Waiting
from app.models import Job
from app.queue.messages import Queue
from app.settings import Settings
from app.specs.catalog import Catalog
from app.states import JOB_TERMINAL, QUEUED
from app.usage import quotas


class PriorityTooHigh(Forbidden):
    """The key's highest priority is lower than the requested one."""

    code, title = "priority_too_high", "Priority too high"


_EVENT_ID = re.compile(rf"{EVENT_PREFIX}(\d{{1,18}})")


def create(
    session: Session, caller: Caller, body: dict[str, Any], catalog: Catalog, queue: Queue, settings: Settings
) -> Job:
    """Create a job and queue it.

    Raises `Invalid` with every error in the spec, `DatasetNotReady`, `CheckpointNotReady`, `QuotaBusy`,
    `QuotaExceeded`.
    """
    resolved = resolve(session, caller.tenant_id, catalog, body, settings)
    for quota in ("queued_jobs", "storage_bytes"):
        quotas.check(session, settings, caller.tenant_id, quota)
    resources = resolved.spec["resources"]
    row = Job(
        id=new_id("job"),
        tenant_id=caller.tenant_id,
        name=resolved.spec["name"],
        status=QUEUED,
        attempt=0,
        dataset_id=resolved.dataset.id,
        spec=resolved.spec,
        labels=resolved.spec["labels"],
        priority=min(0, caller.max_priority),
        gpus=resources["gpus"],
        gpu_memory_gb=resources["gpu_memory_gb"],
        worker_label=resources["label"],
        recipe=recipe_of(resolved.spec),
        workload=workload_of(resolved.spec, resolved.dataset.splits),
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


def set_priority(session: Session, caller: Caller, job_id: str, priority: int) -> Job:
    """Change the priority of a job that has not ended; a running one keeps it for when it is queued again.

    Raises `NotFound`, `PriorityTooHigh`, and `Conflict` for a job that has ended.
    """
    row = assets.found(repository.find_locked(session, caller.tenant_id, assets.checked_id(job_id)), job_id)
    if priority > caller.max_priority:
        raise PriorityTooHigh(
            f"the highest priority of this API key is {caller.max_priority}; got {priority}: use a lower one, or ask "
            "the operator for a key with a higher limit"
        )
    if row.status in JOB_TERMINAL:
        raise Conflict(f"{row.id} is {row.status}; only the priority of a job that has not ended can be changed")
    if priority != row.priority:
        message = f"the priority was changed from {row.priority} to {priority}"
        repository.add_event(session, row, "priority_changed", message)
        row.priority = priority
    return row


def shown(session: Session, settings: Settings, rows: Sequence[Job]) -> list[JobOut]:
    """Return the jobs' resources; queued ones have their position in the queue."""
    waiting = Waiting(session, settings)
    return [JobOut.of(row).model_copy(update={"queue": waiting.of(row)}) for row in rows]


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
    """Return a job's metrics, by step. Raises `NotFound`."""
    job = get(session, caller, job_id)
    rows = repository.metrics(session, job.id, subject=subject, after_step=after_step, limit=limit + 1)
    return MetricsOut(data=[MetricOut.model_validate(row) for row in rows[:limit]], has_more=len(rows) > limit)
