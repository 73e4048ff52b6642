"""/v1/workers."""

from fastapi import APIRouter

from app.http.auth import CurrentCaller
from app.http.dependencies import DatabaseDep, SettingsDep
from app.http.problems import problems
from app.workers import service
from app.workers.schemas import WorkersOut

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("", responses=problems())
def list_workers(caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> WorkersOut:
    """List the registered workers, by name."""
    with database.read() as session:
        return WorkersOut(data=service.listed(session, settings, caller))
