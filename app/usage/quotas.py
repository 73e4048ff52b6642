"""Quotas: what a tenant may have at most, checked in the transaction that would add to it.

The service's settings hold for every tenant; `Tenant.limits` says what differs for one (null: no limit).
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
    """The tenant has as much as it may of what somebody must remove."""

    status, code, title = 403, "quota_exceeded", "Quota used up"


class QuotaBusy(ServiceError):
    """The tenant has as much at once as it may, and time or the tenant's own work makes room."""

    status, code, title = 429, "quota_busy", "Quota used up for now"


@dataclass(frozen=True)
class Quota:
    """One limit.

    Attributes:
        count: returns the present value of a tenant.
        what: what is counted, for people.
        remedy: what would make room, for people.
        passes: whether it ends without anything being removed (429), or not (403).
    """

    count: Callable[[Session, str], int]
    what: str
    remedy: str
    passes: bool


def storage_bytes(session: Session, tenant_id: str) -> int:
    """Return the bytes that the tenant's objects take together."""
    return sum(repository.storage(session, tenant_id).values())


QUOTAS: Final[dict[str, Quota]] = {
    "queued_jobs": Quota(repository.queued_jobs, "queued jobs", "wait until one begins, or cancel one", passes=True),
    "uploads": Quota(
        repository.uploads,
        "datasets and checkpoints that wait for their content",
        "send the content of one, or delete it",
        passes=True,
    ),
    "datasets": Quota(repository.datasets, "datasets", "delete one that no job uses", passes=False),
    "storage_bytes": Quota(
        storage_bytes, "stored bytes", "delete datasets or checkpoints that no job uses", passes=False
    ),
}


def limit_of(settings: Settings, own: dict[str, int | None], name: str) -> int | None:
    """Return the limit that holds for a tenant whose own limits are `own`; None: there is none."""
    service: int | None = getattr(settings, f"quota_{name}")
    return own.get(name, service)


def check(session: Session, settings: Settings, tenant_id: str, name: str, *, more: int = 1) -> None:
    """Raise `QuotaExceeded` or `QuotaBusy` if the tenant may not have `more` of what `name` limits.

    In a writing session two requests that check at once take turns, so that a limit holds exactly.
    """
    if limit_of(settings, repository.limits(session, tenant_id), name) is None:
        return
    limit = limit_of(settings, repository.limits_locked(session, tenant_id), name)
    quota = QUOTAS[name]
    present = quota.count(session, tenant_id)
    if limit is None or present + more <= limit:
        return
    needed = f", and this needs {more} more" if more > 1 else ""
    detail = f"the quota {name} allows {limit} {quota.what}; there are {present}{needed}: {quota.remedy}"
    if quota.passes:
        raise QuotaBusy(detail, headers={"Retry-After": str(RETRY_AFTER_S)})
    raise QuotaExceeded(detail)
