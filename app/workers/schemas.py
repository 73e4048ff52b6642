"""Responses of workers."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from app.models import Worker

WorkerStatus = Literal["idle", "busy", "draining", "silent"]


class WorkingOn(BaseModel):
    """A row that a worker holds."""

    id: str
    name: str
    since: datetime | None


class WorkerOut(BaseModel):
    """A worker."""

    id: str
    object: Literal["worker"] = "worker"
    name: str
    host: str
    status: WorkerStatus = Field(
        description="silent: no heartbeat for longer than a lease; draining: finishes its work and takes no more."
    )
    busy: bool
    working_on: WorkingOn | None = Field(description="The row that it works on, if it is the caller's.")
    queues: list[str] = Field(description="jobs, checks (of datasets and checkpoints), or both.")
    labels: list[str] = Field(description="Labels that a job's `resources.label` may require.")
    device: Literal["cuda", "cpu"]
    gpus: int
    gpu_memory_gb: float | None = Field(description="Memory of its smallest GPU, GB.")
    processes: int = Field(description="Largest `resources.gpus` of a job that it takes; without GPUs, processes.")
    started_at: datetime
    seen_at: datetime

    @classmethod
    def of(cls, row: Worker, **members: Any) -> Self:
        """Return the worker of a row, with the members that are not columns."""
        columns = {name: getattr(row, name) for name in cls.model_fields if hasattr(row, name)}
        return cls.model_validate(columns | members)


class WorkersOut(BaseModel):
    """Every worker, by name."""

    data: list[WorkerOut]
