"""Usage: what a tenant uses, and setting a tenant's own limits."""

from sqlalchemy.orm import Session

from app.errors import NotFound
from app.keys.repository import tenant_by_name
from app.settings import Settings
from app.usage import repository
from app.usage.quotas import QUOTAS, limit_of
from app.usage.schemas import Quotas, QuotaUse, StorageUse, UsageOut


def of_tenant(session: Session, settings: Settings, tenant_id: str) -> UsageOut:
    """Return what the tenant uses, and its limits."""
    storage = repository.storage(session, tenant_id)
    total = sum(storage.values())
    own = repository.limits(session, tenant_id)
    uses = {
        name: QuotaUse(
            used=total if name == "storage_bytes" else quota.count(session, tenant_id),
            limit=limit_of(settings, own, name),
        )
        for name, quota in QUOTAS.items()
    }
    return UsageOut(storage=StorageUse(**storage, total_bytes=total), quotas=Quotas(**uses))


def set_limits(session: Session, tenant_name: str, changes: dict[str, int | None], cleared: list[str]) -> None:
    """Set limits of a tenant's own (None: no limit), and remove those in `cleared`, so that the settings apply again.

    Raises `NotFound` for an unknown tenant, `ValueError` for an unknown quota or a negative limit.
    """
    for name in (*changes, *cleared):
        if name not in QUOTAS:
            raise ValueError(f"there is no quota {name!r}; the quotas are {', '.join(QUOTAS)}")
    for name, limit in changes.items():
        if limit is not None and limit < 0:
            raise ValueError(f"{name} must be at least 0; got {limit}")
    tenant = tenant_by_name(session, tenant_name)
    if tenant is None:
        raise NotFound(f"there is no tenant {tenant_name!r}; `defeat admin usage` lists them")
    limits = (tenant.limits or {}) | changes
    tenant.limits = {name: limit for name, limit in limits.items() if name not in cleared} or None
