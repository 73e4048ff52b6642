"""The expected duration of a job, estimated from earlier jobs.

Two jobs have the same `recipe` if student and teacher have the same architecture, backbone and image size, and if
methods and number of GPUs are the same. The duration is assumed to be proportional to the `workload`: the number of
images that pass through training of the student and, if the job trains one, of the teacher. The estimate uses seconds
per image of the newest jobs with the same recipe, of any tenant, that succeeded in their first attempt. Median and
quartiles give the duration of another workload and its uncertainty.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.models import Job
from app.states import SUCCEEDED

NEWEST = 50
LEAST = 3
Spread = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


def recipe_of(spec: Mapping[str, Any]) -> str:
    """Return a hash of what determines the time per image: 40 hexadecimal digits."""
    methods = spec["distillation"] if isinstance(spec["distillation"], list) else [spec["distillation"]]
    teacher = spec["teacher"]
    parts = [
        _detector(spec["student"]),
        teacher and [teacher["source"] == "train", _detector(teacher)],
        sorted(method["method"] for method in methods),
        spec["resources"]["gpus"],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _detector(side: Mapping[str, Any]) -> Any:
    detector = side["detector"]
    if not isinstance(detector, dict):  # a pretrained teacher's name
        return detector
    return [detector.get(key) for key in ("architecture", "backbone", "min_size", "max_size", "size")]


def workload_of(spec: Mapping[str, Any], splits: Mapping[str, Any] | None) -> float | None:
    """Return how many images pass through training, over all epochs; None if the dataset has no counts."""
    images = ((splits or {}).get("train") or {}).get("images")
    if not images:
        return None
    epochs = spec["schedule"]["epochs"]
    if spec["teacher"] is not None and spec["teacher"]["source"] == "train":
        epochs += spec["teacher"]["schedule"]["epochs"]
    return float(images * epochs)


class Durations:
    """Durations of jobs; it queries each recipe once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rates: dict[str, Spread | None] = {}

    def of(self, recipe: str | None, workload: float | None) -> Spread | None:
        """Return the duration of such a job, seconds; None if fewer than three with its recipe have succeeded."""
        if recipe is None or workload is None:
            return None
        if recipe not in self._rates:
            self._rates[recipe] = self._learn(recipe)
        rates = self._rates[recipe]
        return rates and (rates[0] * workload, rates[1] * workload, rates[2] * workload)

    def _learn(self, recipe: str) -> Spread | None:
        statement = select(Job.started_at, Job.finished_at, Job.workload).where(
            Job.recipe == recipe, Job.status == SUCCEEDED, Job.attempt == 1, Job.workload.is_not(None)
        )
        rates = [
            (finished_at - started_at).total_seconds() / workload
            for started_at, finished_at, workload in self._session.execute(
                statement.order_by(Job.finished_at.desc()).limit(NEWEST)
            )
            if started_at and finished_at and workload
        ]
        if len(rates) < LEAST:
            return None
        low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
        return low, median, high
