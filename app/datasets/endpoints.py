"""/v1/datasets."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from app import assets
from app.datasets import repository, service
from app.datasets.references import ReferenceNotAllowed
from app.datasets.schemas import DatasetCreate, DatasetOut, ReportOut
from app.errors import Conflict, Invalid, NotFound, PayloadTooLarge, StorageFull, UploadIncomplete
from app.http.auth import CrossSite, CurrentCaller
from app.http.dependencies import DatabaseDep, QueueDep, SettingsDep, StorageDep
from app.http.idempotency import IdempotencyHeader, KeyReused, once
from app.http.pagination import Page, PageQuery, page_of, page_query
from app.http.problems import problems
from app.http.uploads import BadDigest, EmptyUpload, UploadTooLarge
from app.models import Dataset
from app.usage.quotas import QuotaBusy, QuotaExceeded

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

UPLOAD_PROBLEMS = problems(
    NotFound, Conflict, UploadTooLarge, UploadIncomplete, EmptyUpload, BadDigest, StorageFull, QuotaExceeded, CrossSite
)
RAW_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    "parameters": [
        {
            "name": "Content-Digest",
            "in": "header",
            "schema": {"type": "string"},
            "description": "`sha-256=:<base64>:`; a body with another digest is rejected with `upload_incomplete`.",
        }
    ],
}


@router.post(
    "",
    status_code=201,
    responses=problems(Invalid, ReferenceNotAllowed, KeyReused, QuotaExceeded, QuotaBusy, PayloadTooLarge, CrossSite),
)
def create_dataset(
    body: DatasetCreate,
    response: Response,
    caller: CurrentCaller,
    database: DatabaseDep,
    settings: SettingsDep,
    queue: QueueDep,
    idempotency_key: IdempotencyHeader = None,
) -> DatasetOut:
    """Create a dataset: from a reference, or from an upload that follows (PUT /v1/datasets/{id}/content)."""
    with database.write() as session:
        return once(
            session,
            caller,
            response,
            route="datasets",
            key=idempotency_key,
            body=body.model_dump(),
            output=DatasetOut,
            create=lambda: DatasetOut.of(service.create(session, caller, body, settings, queue)),
        )


@router.put("/{dataset_id}/content", status_code=202, responses=UPLOAD_PROBLEMS, openapi_extra=RAW_BODY)
async def upload_dataset(
    dataset_id: str,
    request: Request,
    caller: CurrentCaller,
    database: DatabaseDep,
    storage: StorageDep,
    queue: QueueDep,
    settings: SettingsDep,
) -> DatasetOut:
    """Upload the archive (zip, tar, tar.gz, tar.bz2, tar.xz) as the raw body; the service then checks it."""
    row = await assets.upload(
        request, caller, Dataset, dataset_id, database=database, storage=storage, queue=queue, settings=settings
    )
    return DatasetOut.of(row)


@router.get("", responses=problems(Invalid))
def list_datasets(
    caller: CurrentCaller, database: DatabaseDep, page: Annotated[PageQuery, Depends(page_query)]
) -> Page[DatasetOut]:
    """List datasets, newest first."""
    with database.read() as session:
        rows, cursor = page_of(session, repository.of_tenant(caller.tenant_id), Dataset, page)
        return Page(data=[DatasetOut.of(row) for row in rows], has_more=cursor is not None, next_cursor=cursor)


@router.get("/{dataset_id}", responses=problems(NotFound))
def get_dataset(dataset_id: str, caller: CurrentCaller, database: DatabaseDep) -> DatasetOut:
    """Return one dataset."""
    with database.read() as session:
        return DatasetOut.of(service.get(session, caller, dataset_id))


@router.get("/{dataset_id}/report", responses=problems(NotFound))
def get_dataset_report(dataset_id: str, caller: CurrentCaller, database: DatabaseDep) -> ReportOut:
    """Return the report of the dataset's check."""
    with database.read() as session:
        return ReportOut.model_validate(service.get_report(session, caller, dataset_id))


@router.delete(
    "/{dataset_id}", status_code=204, responses=problems(NotFound, service.DatasetInUse, Conflict, CrossSite)
)
def delete_dataset(dataset_id: str, caller: CurrentCaller, database: DatabaseDep, storage: StorageDep) -> None:
    """Delete a dataset that no job refers to, with its files."""
    with database.write() as session:
        service.delete(session, caller, dataset_id, storage)
