"""Responses of jobs."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.http.schemas import Resource
from app.models import MAX_PRIORITY, JobEvent, Leased
from app.request_models import Body

JobStatus = Literal[
    "queued", "preparing", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"
]
RetryFrom = Literal["checkpoint", "beginning"]
Subject = Literal["teacher", "student"]
EVENT_PREFIX = "evt_"


class Progress(BaseModel):
    """Where a run is; `fraction` is of the whole run, 0 to 1. What does not apply is null."""

    phase: str
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    fraction: float | None = None
    eta_s: float | None = None
    images_per_s: float | None = None


class QueueOut(BaseModel):
    """Where a queued job stands. Times are until it begins, from how long jobs like those ahead have taken."""

    position: int | None = Field(description="1: the next to begin; null where more are ahead than are looked at.")
    jobs_ahead: int = Field(description="Jobs that begin before it, if nothing comes or ends; 200: that many or more.")
    waiting_for: str = Field(description="For people: a free worker, 2 GPUs, a worker with label x, retry at …")
    eta_s: float | None = Field(description="Median of the time until it begins, seconds; null where nobody can know.")
    eta_low_s: float | None = Field(description="The same, if all ahead are as fast as the fastest quarter.")
    eta_high_s: float | None = Field(description="The same for the slowest quarter.")


class Results(BaseModel):
    """What came out: COCO metrics of the last teacher and of the best student."""

    model_config = ConfigDict(extra="allow")

    teacher: dict[str, Any] | None = None
    student: dict[str, Any] | None = None
    teacher_checkpoint_id: str | None = None


class JobOut(Resource):
    """A job."""

    object: Literal["job"] = "job"
    labels: dict[str, str]
    status: JobStatus
    attempt: int = Field(description="How often a worker has begun it.")
    dataset_id: str
    spec: dict[str, Any] = Field(description="The resolved spec: every default filled in.")
    priority: int = Field(description="-100 to 100; of the jobs that wait, those with the highest go first.")
    queue: QueueOut | None = Field(description="Where it stands in the queue; null for a job that does not wait.")
    adjustments: dict[str, Any] | None = Field(
        description="What the service changed in the spec, in its shape, after memory ran out; null: nothing."
    )
    not_before: datetime | None = Field(description="When it is tried again at the earliest; null: as soon as can be.")
    progress: Progress | None
    results: Results | None

    @classmethod
    def derived(cls, row: Leased) -> Mapping[str, Any]:
        """See `Resource`."""
        path = f"/v1/jobs/{row.id}"
        parts = ("events", "metrics", "evaluations", "artifacts", "pause", "resume", "cancel", "retry")
        return {"queue": None, "links": {"self": path} | {part: f"{path}/{part}" for part in parts}}


class JobPatch(Body):
    """What of a job may be changed."""

    priority: int = Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Higher goes first; at most what the key may.")


class RetryBody(Body):
    """Where another attempt of a job begins."""

    start: RetryFrom | None = Field(
        None,
        alias="from",
        description="`checkpoint`: the last training checkpoint; `beginning`: what was logged is forgotten. Null: the "
        "checkpoint if there is one.",
    )


class ValidatedOut(BaseModel):
    """A spec that would be taken."""

    spec: dict[str, Any] = Field(description="The resolved spec: every default filled in.")


class EventOut(BaseModel):
    """A message about a job."""

    id: str
    object: Literal["event"] = "event"
    level: Literal["info", "warn", "error"]
    code: str
    message: str
    created_at: datetime

    @classmethod
    def of(cls, row: JobEvent) -> "EventOut":
        """Return the event that a row is; its id sorts by creation."""
        members = {name: getattr(row, name) for name in ("level", "code", "message", "created_at")}
        return cls.model_validate({"id": f"{EVENT_PREFIX}{row.id:012d}", **members})


class MetricOut(BaseModel):
    """What was logged at one optimiser step."""

    model_config = ConfigDict(from_attributes=True)

    subject: Subject
    step: int
    epoch: float
    values: dict[str, float | None]


class MetricsOut(BaseModel):
    """Logged values by step; ask again with `after_step` of the last one while `has_more`."""

    data: list[MetricOut]
    has_more: bool


class EvaluationOut(BaseModel):
    """COCO metrics of one detector after one epoch."""

    model_config = ConfigDict(from_attributes=True)

    subject: Subject
    epoch: int
    metrics: dict[str, Any]


class EvaluationsOut(BaseModel):
    """A job's evaluations, by epoch."""

    data: list[EvaluationOut]
