"""/v1/checkpoints."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from app import assets
from app.checkpoints import repository, service
from app.checkpoints.schemas import CheckpointCreate, CheckpointOut
from app.datasets.endpoints import RAW_BODY, UPLOAD_PROBLEMS
from app.errors import Conflict, Invalid, NotFound, PayloadTooLarge, RangeNotSatisfiable
from app.http import downloads
from app.http.auth import CrossSite, CurrentCaller
from app.http.dependencies import CatalogDep, DatabaseDep, QueueDep, SettingsDep, StorageDep
from app.http.idempotency import IdempotencyHeader, KeyReused, once
from app.http.pagination import Page, PageQuery, page_of, page_query
from app.http.problems import problems
from app.models import Checkpoint
from app.usage.quotas import QuotaBusy

router = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"])


@router.post("", status_code=201, responses=problems(Invalid, KeyReused, QuotaBusy, PayloadTooLarge, CrossSite))
def create_checkpoint(
    body: CheckpointCreate,
    response: Response,
    caller: CurrentCaller,
    database: DatabaseDep,
    catalog: CatalogDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyHeader = None,
) -> CheckpointOut:
    """Create a checkpoint. Upload its weights next: PUT /v1/checkpoints/{id}/content."""
    with database.write() as session:
        return once(
            session,
            caller,
            response,
            route="checkpoints",
            key=idempotency_key,
            body=body.model_dump(),
            output=CheckpointOut,
            create=lambda: CheckpointOut.of(service.create(session, caller, body, catalog, settings)),
        )


@router.put("/{checkpoint_id}/content", status_code=202, responses=UPLOAD_PROBLEMS, openapi_extra=RAW_BODY)
async def upload_checkpoint(
    checkpoint_id: str,
    request: Request,
    caller: CurrentCaller,
    database: DatabaseDep,
    storage: StorageDep,
    queue: QueueDep,
    settings: SettingsDep,
) -> CheckpointOut:
    """Upload the weights (safetensors, or a torch file of tensors) as the raw body; the service then checks them."""
    row = await assets.upload(
        request, caller, Checkpoint, checkpoint_id, database=database, storage=storage, queue=queue, settings=settings
    )
    return CheckpointOut.of(row)


@router.get("", responses=problems(Invalid))
def list_checkpoints(
    caller: CurrentCaller, database: DatabaseDep, page: Annotated[PageQuery, Depends(page_query)]
) -> Page[CheckpointOut]:
    """List checkpoints, newest first."""
    with database.read() as session:
        rows, cursor = page_of(session, repository.of_tenant(caller.tenant_id), Checkpoint, page)
        return Page(data=[CheckpointOut.of(row) for row in rows], has_more=cursor is not None, next_cursor=cursor)


@router.get("/{checkpoint_id}", responses=problems(NotFound))
def get_checkpoint(checkpoint_id: str, caller: CurrentCaller, database: DatabaseDep) -> CheckpointOut:
    """Return one checkpoint."""
    with database.read() as session:
        return CheckpointOut.of(service.get(session, caller, checkpoint_id))


@router.head("/{checkpoint_id}/content", include_in_schema=False)
@router.get(
    "/{checkpoint_id}/content",
    response_class=Response,
    openapi_extra=downloads.PARAMETERS,
    responses=downloads.RESPONSES | problems(NotFound, service.CheckpointNotReady, RangeNotSatisfiable),
)
def download_checkpoint(
    checkpoint_id: str,
    request: Request,
    caller: CurrentCaller,
    database: DatabaseDep,
    storage: StorageDep,
) -> Response:
    """Return the weights as one safetensors file, with the detector spec and the classes in its header."""
    with database.read() as session:
        row = service.get_ready(session, caller, checkpoint_id)
    service.note_download(database, row)
    return downloads.respond(
        request,
        storage,
        key=row.storage_key or "",
        size_bytes=row.size_bytes or 0,
        sha256=row.sha256 or "",
        content_type="application/octet-stream",
        name=f"{row.id}.safetensors",
    )


@router.delete(
    "/{checkpoint_id}", status_code=204, responses=problems(NotFound, service.CheckpointInUse, Conflict, CrossSite)
)
def delete_checkpoint(checkpoint_id: str, caller: CurrentCaller, database: DatabaseDep, storage: StorageDep) -> None:
    """Delete a checkpoint that no unfinished job refers to, with its weights."""
    with database.write() as session:
        service.delete(session, caller, checkpoint_id, storage)
