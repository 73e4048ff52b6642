"""/v1/jobs/{id}/artifacts."""

from fastapi import APIRouter, Request, Response

from app.artifacts import service
from app.artifacts.schemas import ArtifactOut
from app.errors import NotFound, RangeNotSatisfiable
from app.http import downloads
from app.http.auth import CurrentCaller
from app.http.dependencies import DatabaseDep, StorageDep
from app.http.pagination import Page
from app.http.problems import problems

router = APIRouter(prefix="/v1/jobs/{job_id}/artifacts", tags=["artifacts"])


@router.get("", responses=problems(NotFound))
def list_artifacts(job_id: str, caller: CurrentCaller, database: DatabaseDep) -> Page[ArtifactOut]:
    """List a job's artifacts by name, on one page."""
    with database.read() as session:
        rows = service.list_all(session, caller, job_id)
        return Page(data=[ArtifactOut.of(row) for row in rows], has_more=False, next_cursor=None)


@router.head("/{name:path}", include_in_schema=False)
@router.get(
    "/{name:path}",
    response_class=Response,
    openapi_extra=downloads.PARAMETERS,
    responses=downloads.RESPONSES | problems(NotFound, RangeNotSatisfiable),
)
def download_artifact(
    job_id: str,
    name: str,
    request: Request,
    caller: CurrentCaller,
    database: DatabaseDep,
    storage: StorageDep,
) -> Response:
    """Return one file; its `ETag` is its SHA-256."""
    with database.read() as session:
        row = service.get(session, caller, job_id, name)
    return downloads.respond(
        request,
        storage,
        key=row.storage_key,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        content_type=row.content_type,
        name=row.name,
    )
