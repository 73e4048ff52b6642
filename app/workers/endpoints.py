"""/v1/workers."""

from fastapi import APIRouter

from app.auth import CurrentCaller
from app.dependencies import DatabaseDep, SettingsDep
from app.problems import problems
from app.workers import service
from app.workers.schemas import WorkersOut

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("", responses=problems())
def list_workers(caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> WorkersOut:
    """List the workers that are there, or were a moment ago, by name."""
    with database.read() as session:
        return WorkersOut(data=service.listed(session, settings, caller))
