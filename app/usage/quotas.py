"""Quotas: limits of what a tenant may have, checked in the transaction that adds to it.

The settings apply to every tenant; `Tenant.limits` overrides them for one (null: no limit).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from app.errors import ServiceError
from app.settings import Settings
from app.usage import repository

RETRY_AFTER_S: Final = 60


class QuotaExceeded(ServiceError):
    """A quota is used up, and something must be deleted to make room."""

    status, code, title = 403, "quota_exceeded", "Quota used up"


class QuotaBusy(ServiceError):
    """A quota is used up, and waiting, or finishing what was begun, makes room."""

    status, code, title = 429, "quota_busy", "Quota used up for now"


@dataclass(frozen=True)
class Quota:
    """One limit.

    Attributes:
        count: returns a tenant's current value.
        what: what is counted, as text.
        remedy: what makes room, as text.
        passes: whether room comes without deleting anything (429), or not (403).
    """

    count: Callable[[Session, str], int]
    what: str
    remedy: str
    passes: bool


def storage_bytes(session: Session, tenant_id: str) -> int:
    """Return the bytes that all of the tenant's objects use."""
    return sum(repository.storage(session, tenant_id).values())


QUOTAS: Final[dict[str, Quota]] = {
    "queued_jobs": Quota(repository.queued_jobs, "queued jobs", "wait until one begins, or cancel one", passes=True),
    "uploads": Quota(
        repository.uploads,
        "datasets and checkpoints that await their content",
        "upload the content of one, or delete one",
        passes=True,
    ),
    "datasets": Quota(repository.datasets, "datasets", "delete one that no job uses", passes=False),
    "storage_bytes": Quota(
        storage_bytes, "stored bytes", "delete datasets or checkpoints that no job uses", passes=False
    ),
}


def limit_of(settings: Settings, own: dict[str, int | None], name: str) -> int | None:
    """Return the limit of a tenant whose own limits are `own`; None: no limit."""
    service: int | None = getattr(settings, f"quota_{name}")
    return own.get(name, service)


def check(session: Session, settings: Settings, tenant_id: str, name: str, *, more: int = 1) -> None:
    """Raise `QuotaExceeded` or `QuotaBusy` if `more` would exceed the tenant's quota `name`.

    In a write session concurrent requests check one after the other, so that a limit is exact.
    """
    if limit_of(settings, repository.limits(session, tenant_id), name) is None:
        return
    limit = limit_of(settings, repository.limits_locked(session, tenant_id), name)
    quota = QUOTAS[name]
    present = quota.count(session, tenant_id)
    if limit is None or present + more <= limit:
        return
    needed = f", and this request adds {more}" if more > 1 else ""
    detail = f"the quota {name} is {limit} {quota.what}; there are {present}{needed}: {quota.remedy}"
    if quota.passes:
        raise QuotaBusy(detail, headers={"Retry-After": str(RETRY_AFTER_S)})
    raise QuotaExceeded(detail)
