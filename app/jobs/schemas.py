"""Request bodies and responses of jobs."""

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
    """Progress of a run. `fraction` is of the whole run, 0 to 1. Members that do not apply are null."""

    phase: str
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    fraction: float | None = None
    eta_s: float | None = None
    images_per_s: float | None = None


class QueueOut(BaseModel):
    """Position of a queued job. Times are estimates until it begins, from the durations of similar jobs."""

    position: int | None = Field(description="1: the next to begin; null if more jobs are ahead than are counted.")
    jobs_ahead: int = Field(
        description="Jobs that begin before it, if no job is added or ends; 200: that many or more."
    )
    waiting_for: str = Field(description="Text for display: a free worker, 2 GPUs, a worker with label x, retry at …")
    eta_s: float | None = Field(
        description="Median estimate of the time until it begins, seconds; null if it cannot be estimated."
    )
    eta_low_s: float | None = Field(description="The same for the lower quartile of durations.")
    eta_high_s: float | None = Field(description="The same for the upper quartile of durations.")


class Results(BaseModel):
    """Results: COCO metrics of the last teacher and of the best student."""

    model_config = ConfigDict(extra="allow")

    teacher: dict[str, Any] | None = None
    student: dict[str, Any] | None = None
    teacher_checkpoint_id: str | None = None


class JobOut(Resource):
    """A job."""

    object: Literal["job"] = "job"
    labels: dict[str, str]
    status: JobStatus
    attempt: int = Field(description="How many times a worker has started it.")
    dataset_id: str
    spec: dict[str, Any] = Field(description="The resolved spec: every default filled in.")
    priority: int = Field(description="-100 to 100; queued jobs with a higher priority begin first.")
    queue: QueueOut | None = Field(description="Position in the queue; null for a job that is not queued.")
    adjustments: dict[str, Any] | None = Field(
        description="What the service changed in the spec after memory ran out, in the spec's structure; null: nothing."
    )
    not_before: datetime | None = Field(
        description="Earliest time of the next attempt; null: as soon as a worker is free."
    )
    progress: Progress | None
    results: Results | None

    @classmethod
    def derived(cls, row: Leased) -> Mapping[str, Any]:
        """See `Resource`."""
        path = f"/v1/jobs/{row.id}"
        parts = ("events", "metrics", "evaluations", "artifacts", "pause", "resume", "cancel", "retry")
        return {"queue": None, "links": {"self": path} | {part: f"{path}/{part}" for part in parts}}


class JobPatch(Body):
    """The members of a job that can be changed."""

    priority: int = Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Higher begins first; limited by the API key.")


class RetryBody(Body):
    """Where the next attempt of a job begins."""

    start: RetryFrom | None = Field(
        None,
        alias="from",
        description="`checkpoint`: at the last training checkpoint; `beginning`: from the start, and the metrics are "
        "deleted. Null: at the checkpoint if there is one.",
    )


class ValidatedOut(BaseModel):
    """A valid spec."""

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
        """Return the event of a row. Ids sort by creation."""
        members = {name: getattr(row, name) for name in ("level", "code", "message", "created_at")}
        return cls.model_validate({"id": f"{EVENT_PREFIX}{row.id:012d}", **members})


class MetricOut(BaseModel):
    """The values logged at one optimiser step."""

    model_config = ConfigDict(from_attributes=True)

    subject: Subject
    step: int
    epoch: float
    values: dict[str, float | None]


class MetricsOut(BaseModel):
    """Logged values by step. While `has_more`, request the next with `after_step` of the last one."""

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
