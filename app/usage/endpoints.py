"""/v1/usage."""

from fastapi import APIRouter

from app.http.auth import CurrentCaller
from app.http.dependencies import DatabaseDep, SettingsDep
from app.http.problems import problems
from app.usage import service
from app.usage.schemas import UsageOut

router = APIRouter(prefix="/v1/usage", tags=["usage"])


@router.get("", responses=problems())
def get_usage(caller: CurrentCaller, database: DatabaseDep, settings: SettingsDep) -> UsageOut:
    """Return what the caller's tenant stores and has queued, and its limits."""
    with database.read() as session:
        return service.of_tenant(session, settings, caller.tenant_id)
