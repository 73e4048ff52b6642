"""The resources as the service sends them (see docs/api.md). The service may add members at any time."""

from typing import Any, Literal, TypedDict

AssetStatus = Literal["awaiting_upload", "queued", "checking", "ready", "invalid", "failed"]
JobStatus = Literal[
    "queued", "preparing", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"
]
RetryFrom = Literal["checkpoint", "beginning"]
Subject = Literal["teacher", "student"]

ASSET_TERMINAL = frozenset({"ready", "invalid", "failed"})
JOB_TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
SUBJECTS: tuple[Subject, ...] = ("teacher", "student")

Failure = TypedDict("Failure", {"class": str, "code": str, "detail": str, "log_tail": list[str]}, total=False)
"""Why a resource failed: class `user`, `data`, `oom` or `infra`, a stable code, and the detail with the remedy."""


class Problem(TypedDict):
    """One error in a request; `pointer` is the JSON Pointer of the wrong value."""

    pointer: str
    code: str
    detail: str


class Counts(TypedDict):
    """Counts of a split."""

    images: int
    boxes: int


class Dataset(TypedDict):
    """Images with boxes; usable by jobs once `status` is ready."""

    id: str
    object: Literal["dataset"]
    name: str
    status: AssetStatus
    source: dict[str, Any]
    max_dropped_fraction: float
    format: str | None
    classes: list[str] | None
    splits: dict[str, Counts] | None
    content_hash: str | None
    size_bytes: int | None
    failure: Failure | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    links: dict[str, str]


class ReportProblem(TypedDict):
    """One kind of problem in a dataset; `examples` are its first occurrences, `{"file", "detail"}`."""

    code: str
    severity: Literal["note", "dropped", "fatal"]
    count: int
    summary: str
    examples: list[dict[str, str]]


class Report(TypedDict):
    """The report of a dataset's check; numbers are None if the check ended before it counted."""

    format: str | None
    images: int | None
    boxes: int | None
    classes: list[dict[str, Any]]
    splits: dict[str, Counts]
    problems: list[ReportProblem]
    dropped_fraction: float | None
    max_dropped_fraction: float | None


class Checkpoint(TypedDict):
    """A detector's weights; usable by jobs once `status` is ready."""

    id: str
    object: Literal["checkpoint"]
    name: str
    status: AssetStatus
    detector: dict[str, Any] | None
    classes: list[str] | None
    coverage: dict[str, Any] | None
    sha256: str | None
    size_bytes: int | None
    failure: Failure | None
    source_job_id: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    links: dict[str, str]


class Progress(TypedDict):
    """Progress of a job; `fraction` is of the whole job, 0 to 1. Members that do not apply are None."""

    phase: str
    epoch: int | None
    epochs: int | None
    step: int | None
    steps: int | None
    fraction: float | None
    eta_s: float | None
    images_per_s: float | None


class Queue(TypedDict):
    """Position of a queued job; times are estimates until it begins, None if it cannot be estimated."""

    position: int | None
    jobs_ahead: int
    waiting_for: str
    eta_s: float | None
    eta_low_s: float | None
    eta_high_s: float | None


class Worker(TypedDict):
    """A worker of the service: its resources and its work."""

    id: str
    object: Literal["worker"]
    name: str
    host: str
    status: Literal["idle", "busy", "draining", "silent"]
    busy: bool
    working_on: dict[str, Any] | None
    queues: list[str]
    labels: list[str]
    device: Literal["cuda", "cpu"]
    gpus: int
    gpu_memory_gb: float | None
    processes: int
    started_at: str
    seen_at: str


class Job(TypedDict):
    """One distillation: its spec, its state, its results."""

    id: str
    object: Literal["job"]
    name: str
    labels: dict[str, str]
    status: JobStatus
    attempt: int
    dataset_id: str
    spec: dict[str, Any]
    priority: int
    queue: Queue | None
    adjustments: dict[str, Any] | None
    not_before: str | None
    progress: Progress | None
    results: dict[str, Any] | None
    failure: Failure | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    links: dict[str, str]


class Event(TypedDict):
    """A message about a job."""

    id: str
    level: Literal["info", "warn", "error"]
    code: str
    message: str
    created_at: str


class Metrics(TypedDict):
    """The values logged at one optimiser step of one subject, such as `loss/total` and `images_per_s`."""

    subject: Subject
    step: int
    epoch: float
    values: dict[str, float | None]


class Evaluation(TypedDict):
    """The COCO metrics (0 to 1) of one detector after one epoch; epoch 0 is before training."""

    subject: Subject
    epoch: int
    metrics: dict[str, Any]


class Artifact(TypedDict):
    """A file that a job produced."""

    name: str
    kind: Literal["student", "teacher", "metrics", "log", "gallery"]
    content_type: str
    size_bytes: int
    sha256: str
    details: dict[str, Any]
    created_at: str


class Update(TypedDict):
    """A job's current state, and its events, metrics and evaluations since the previous update."""

    job: Job
    events: list[Event]
    metrics: list[Metrics]
    evaluations: list[Evaluation]
