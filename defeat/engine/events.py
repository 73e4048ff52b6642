"""What a run writes for its supervisor: the lines of `events.jsonl`, and `result.json`.

`defeat.engine.report.Reporter` writes these shapes; `worker.rundir` validates what it reads against the same classes.
The limits in the annotations bind the reader: it replaces a line that breaks one by a warning, so the writer does not
check them. No pydantic here, because it would cost every run the time of its import, and no torch.
"""

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt, MaxLen, Predicate

# pydantic reads this one, not typing's, before Python 3.12.
from typing_extensions import TypedDict

FailureClass = Literal["user", "data", "oom", "infra"]
Level = Literal["info", "warn", "error"]
Subject = Literal["teacher", "student"]
Status = Literal["succeeded", "failed", "cancelled"]

_CONTENT_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(; ?charset=[\w-]+)?")


def _has_time_zone(moment: datetime) -> bool:
    return moment.tzinfo is not None


def _is_content_type(text: str) -> bool:
    return _CONTENT_TYPE.fullmatch(text) is not None


Count = Annotated[int, Ge(0), Lt(2**31)]
Finite = Annotated[float, Predicate(math.isfinite)]
Moment = Annotated[datetime, Predicate(_has_time_zone)]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run is.

    Attributes:
        phase: preparing, importing, checking, teacher, distillation, evaluation or finishing.
        fraction: of the whole run, 0 to 1.
        epoch: the current epoch of `epochs`; None where the phase has none. Likewise `step` of `steps`.
        eta_s: remaining time of the whole run, seconds; None before it can be estimated.
        images_per_s: training images per second; None where nothing is trained.
    """

    type: Literal["progress"] = "progress"
    time: Moment | None = None
    phase: Annotated[str, MaxLen(40)]
    fraction: Annotated[float, Ge(0), Le(1)]
    epoch: Count | None = None
    epochs: Count | None = None
    step: Count | None = None
    steps: Count | None = None
    eta_s: Finite | None = None
    images_per_s: Finite | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """A text for people, with a stable code for programs."""

    type: Literal["message"] = "message"
    time: Moment | None = None
    level: Level
    code: Annotated[str, MaxLen(60)]
    message: Annotated[str, MaxLen(20_000)]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Values of one optimiser step.

    Attributes:
        subject: the detector that is trained.
        step: optimiser steps so far, this one included.
        epoch: epochs so far, fractional.
        values: by metric name; None for a value that is not finite.
    """

    type: Literal["metrics"] = "metrics"
    time: Moment | None = None
    subject: Subject
    step: Count
    epoch: Finite
    values: dict[str, Finite | None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """COCO metrics of one detector after one epoch."""

    type: Literal["evaluation"] = "evaluation"
    time: Moment | None = None
    subject: Subject
    epoch: Count
    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CheckpointOffer:
    """A complete training checkpoint from which another attempt can resume; `path` is relative to the run directory."""

    type: Literal["checkpoint"] = "checkpoint"
    time: Moment | None = None
    path: Annotated[str, MaxLen(200)]


Event = Progress | Message | Metrics | Evaluation | CheckpointOffer


# In this syntax because `class` is a keyword. The reader cuts `detail` rather than rejecting it.
Failure = TypedDict("Failure", {"class": FailureClass, "code": Annotated[str, MaxLen(60)], "detail": str})
"""Why a run failed."""


@dataclass(frozen=True, kw_only=True)
class ResultArtifact:
    """A file under `artifacts/`, as the run registered it."""

    name: Annotated[str, MaxLen(200)]
    kind: Annotated[str, MaxLen(20)]
    content_type: Annotated[str, MaxLen(100), Predicate(_is_content_type)]
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """`result.json`, which a run writes last."""

    status: Status
    results: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    artifacts: Annotated[list[ResultArtifact], MaxLen(1000)] = field(default_factory=list)
