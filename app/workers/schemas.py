"""Responses about workers."""

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
        description="silent: not heard of for longer than a lease; draining: it finishes what it has."
    )
    busy: bool
    working_on: WorkingOn | None = Field(description="What it works on, if that is yours.")
    queues: list[str] = Field(description="jobs, checks (of datasets and checkpoints), or both.")
    labels: list[str] = Field(description="What `resources.label` may name.")
    device: Literal["cuda", "cpu"]
    gpus: int
    gpu_memory_gb: float | None = Field(description="Memory of its smallest GPU, GB.")
    processes: int = Field(description="The most `resources.gpus` that it takes; without GPUs, processes.")
    started_at: datetime
    seen_at: datetime

    @classmethod
    def of(cls, row: Worker, **members: Any) -> Self:
        """Return the worker that a row is, with the members that are not columns."""
        columns = {name: getattr(row, name) for name in cls.model_fields if hasattr(row, name)}
        return cls.model_validate(columns | members)


class WorkersOut(BaseModel):
    """Every worker, by name."""

    data: list[WorkerOut]
