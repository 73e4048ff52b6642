"""What GET /v1/usage answers."""

from typing import Literal

from pydantic import BaseModel


class StorageUse(BaseModel):
    """Bytes in the object store, by kind; uploads are those not yet checked, and of failed checks."""

    uploads_bytes: int
    datasets_bytes: int
    checkpoints_bytes: int
    artifacts_bytes: int
    total_bytes: int


class QuotaUse(BaseModel):
    """How much there is, and how much there may be (null: no limit)."""

    used: int
    limit: int | None


class Quotas(BaseModel):
    """Every quota."""

    queued_jobs: QuotaUse
    uploads: QuotaUse
    datasets: QuotaUse
    storage_bytes: QuotaUse


class UsageOut(BaseModel):
    """What the caller's tenant uses."""

    object: Literal["usage"] = "usage"
    storage: StorageUse
    quotas: Quotas
