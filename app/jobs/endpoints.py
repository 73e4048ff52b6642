"""/v1/jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Response
from sqlalchemy.orm import Session

from app.checkpoints.service import CheckpointNotReady
from app.errors import Conflict, Invalid, NotFound, PayloadTooLarge
from app.http.auth import CrossSite, CurrentCaller
from app.http.dependencies import CatalogDep, DatabaseDep, QueueDep, SettingsDep, StorageDep
from app.http.idempotency import IdempotencyHeader, KeyReused, once
from app.http.pagination import Page, PageQuery, page_of, page_query
from app.http.problems import problems
from app.jobs import lifecycle, repository, service
from app.jobs.resolve import DatasetNotReady, resolve
from app.jobs.schemas import (
    EvaluationOut,
    EvaluationsOut,
    EventOut,
    JobOut,
    JobPatch,
    JobStatus,
    MetricsOut,
    RetryBody,
    Subject,
    ValidatedOut,
)
from app.models import Job
from app.request_models import Name
from app.settings import Settings
from app.usage.quotas import QuotaBusy, QuotaExceeded

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

# A plain object here, so that one answer lists the errors of the outer keys and those found with the catalog.
SpecBody = Annotated[dict[str, Any], Body()]
SPEC_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}
SPEC_PROBLEMS = (Invalid, DatasetNotReady, CheckpointNotReady, PayloadTooLarge, CrossSite)


def _one(session: Session, settings: Settings, row: Job) -> JobOut:
    return service.shown(session, settings, [row])[0]


@router.post(
    "",
    status_code=201,
    responses=problems(*SPEC_PROBLEMS, KeyReused, QuotaExceeded, QuotaBusy),
    openapi_extra=SPEC_SCHEMA,
)
def create_job(
    body: SpecBody,
    response: Response,
    caller: CurrentCaller,
    database: DatabaseDep,
    catalog: CatalogDep,
    queue: QueueDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyHeader = None,
) -> JobOut:
    """Create a job and queue it."""
    with database.write() as session:
        return once(
            session,
            caller,
            response,
            route="jobs",
            key=idempotency_key,
            body=body,
            output=JobOut,
            create=lambda: _one(session, settings, service.create(session, caller, body, catalog, queue, settings)),
        )


@router.post("/validate", responses=problems(*SPEC_PROBLEMS), openapi_extra=SPEC_SCHEMA)
def validate_job(
    body: SpecBody, caller: CurrentCaller, database: DatabaseDep, catalog: CatalogDep, settings: SettingsDep
) -> ValidatedOut:
    """Validate a spec and return it resolved, without creating a job."""
    with database.read() as session:
        return ValidatedOut(spec=resolve(session, caller.tenant_id, catalog, body, settings).spec)


@router.get("", responses=problems(Invalid))
def list_jobs(
    caller: CurrentCaller,
    database: DatabaseDep,
    settings: SettingsDep,
    page: Annotated[PageQuery, Depends(page_query)],
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status.")] = None,
    dataset: Annotated[
        str | None, Query(pattern=r"^ds_[0-9a-z]{1,30}$", description="Only jobs on this dataset.")
    ] = None,
    name: Annotated[Name | None, Query(description="Only jobs whose name contains this, ignoring case.")] = None,
) -> Page[JobOut]:
    """List jobs, newest first."""
    statement = repository.of_tenant(caller.tenant_id, status=status, dataset_id=dataset, name=name)
    with database.read() as session:
        rows, cursor = page_of(session, statement, Job, page)
        return Page(data=service.shown(session, settings, rows), has_more=cursor is not None, next_cursor=cursor)


@router.get("/{job_id}", responses=problems(NotFound))
def get_job(job_id: str, caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> JobOut:
    """Return one job."""
    with database.read() as session:
        return _one(session, settings, service.get(session, caller, job_id))


@router.patch(
    "/{job_id}", responses=problems(NotFound, Conflict, Invalid, service.PriorityTooHigh, CrossSite, PayloadTooLarge)
)
def change_job(
    job_id: str, body: JobPatch, caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep
) -> JobOut:
    """Change a job's priority."""
    with database.write() as session:
        row = service.set_priority(session, caller, job_id, body.priority)
        session.flush()
        return _one(session, settings, row)


@router.post("/{job_id}/cancel", status_code=202, responses=problems(NotFound, Conflict, CrossSite))
def cancel_job(job_id: str, caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> JobOut:
    """Cancel a job. A running job saves its work first. Repeating the request changes nothing."""
    with database.write() as session:
        return _one(session, settings, lifecycle.cancel(session, caller, job_id))


@router.post("/{job_id}/pause", status_code=202, responses=problems(NotFound, Conflict, CrossSite))
def pause_job(job_id: str, caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> JobOut:
    """Pause a job. A running job saves a checkpoint first. Repeating the request changes nothing."""
    with database.write() as session:
        return _one(session, settings, lifecycle.pause(session, caller, job_id))


@router.post("/{job_id}/resume", status_code=202, responses=problems(NotFound, Conflict, CrossSite, QuotaBusy))
def resume_job(
    job_id: str, caller: CurrentCaller, database: DatabaseDep, queue: QueueDep, settings: SettingsDep
) -> JobOut:
    """Queue a paused job again. Repeating the request changes nothing."""
    with database.write() as session:
        return _one(session, settings, lifecycle.resume(session, caller, job_id, queue=queue, settings=settings))


@router.post(
    "/{job_id}/retry",
    status_code=202,
    responses=problems(NotFound, Conflict, Invalid, PayloadTooLarge, CrossSite, KeyReused, QuotaBusy),
)
def retry_job(
    job_id: str,
    response: Response,
    caller: CurrentCaller,
    database: DatabaseDep,
    queue: QueueDep,
    storage: StorageDep,
    settings: SettingsDep,
    body: RetryBody | None = None,
    idempotency_key: IdempotencyHeader = None,
) -> JobOut:
    """Queue another attempt of a job that failed or was cancelled."""
    start = body.start if body is not None else None
    with database.write() as session:
        return once(
            session,
            caller,
            response,
            route="jobs/retry",
            key=idempotency_key,
            body={"job": job_id, "from": start},
            output=JobOut,
            create=lambda: _one(
                session,
                settings,
                lifecycle.retry(session, caller, job_id, start, queue=queue, storage=storage, settings=settings),
            ),
        )


@router.get("/{job_id}/events", responses=problems(NotFound, Invalid))
def list_job_events(
    job_id: str, caller: CurrentCaller, database: DatabaseDep, page: Annotated[PageQuery, Depends(page_query)]
) -> Page[EventOut]:
    """List a job's events, oldest first; `after` is an event's id."""
    with database.read() as session:
        return service.list_events(session, caller, job_id, after=page.after, limit=page.limit)


@router.get("/{job_id}/metrics", responses=problems(NotFound, Invalid))
def list_job_metrics(
    job_id: str,
    caller: CurrentCaller,
    database: DatabaseDep,
    subject: Annotated[Subject, Query(description="Whose training: the teacher's or the student's.")] = "student",
    after_step: Annotated[int, Query(ge=-1, le=2**31 - 1, description="Only later steps.")] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Maximum number of steps.")] = 1000,
) -> MetricsOut:
    """Return a job's logged metrics, by optimiser step."""
    with database.read() as session:
        return service.list_metrics(session, caller, job_id, subject=subject, after_step=after_step, limit=limit)


@router.get("/{job_id}/evaluations", responses=problems(NotFound))
def list_job_evaluations(job_id: str, caller: CurrentCaller, database: DatabaseDep) -> EvaluationsOut:
    """Return a job's evaluations (COCO metrics), by epoch."""
    with database.read() as session:
        job = service.get(session, caller, job_id)
        rows = repository.evaluations(session, job.id)
        return EvaluationsOut(data=[EvaluationOut.model_validate(row) for row in rows])
