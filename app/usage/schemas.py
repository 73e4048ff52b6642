"""Responses of usage."""

from typing import Literal

from pydantic import BaseModel


class StorageUse(BaseModel):
    """Bytes in the object store, by kind. Uploads are those that are not checked yet, or whose check failed."""

    uploads_bytes: int
    datasets_bytes: int
    checkpoints_bytes: int
    artifacts_bytes: int
    total_bytes: int


class QuotaUse(BaseModel):
    """The current value and the limit of a quota (null: no limit)."""

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
