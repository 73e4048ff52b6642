"""Whether another attempt may succeed after one that failed, and the message about it in the job's events.

Failures of the machine (`infra`) are temporary: the row is tried again, each time after a longer pause. Memory (`oom`)
does not grow, so the row is tried again once, with less of the batch at a time. Failures of the spec and of the data
are final.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from app.models import Leased
from app.settings import Settings
from app.states import PAUSED, PAUSING, QUEUED
from worker.patience import pause_s
from worker.rundir import RecordedMessage
from worker.tasks.base import Handler, Outcome

RETRYABLE: Final = frozenset({"infra", "oom"})
"""Classes of failure after which another attempt may succeed."""


@dataclass(frozen=True)
class Retry:
    """Another attempt: the row's status, the columns that change with it, and the message for the job's events."""

    status: str
    values: dict[str, Any]
    message: RecordedMessage


def worker_error(error: Exception) -> Outcome:
    """Return the outcome of an attempt that failed by a defect of the worker itself."""
    if isinstance(error, OSError):
        return Outcome.failed("infra", "worker_disk", f"the worker's scratch directory failed: {error}")
    detail = f"unexpected {type(error).__name__} in the worker; its log has the details"
    return Outcome.failed("infra", "worker_error", detail)


def next_attempt(
    handler: Handler[Any], row: Leased, failure: dict[str, Any], settings: Settings, *, present: datetime
) -> Retry | None:
    """Return the attempt that follows this failure of the row, or None if the failure is final.

    A job whose owner has requested a pause waits for its owner and not for the clock.

    Args:
        row: as it is at `present`, by the database's clock.
    """
    if failure["class"] == "oom":
        reduced = handler.reduce_memory(row)
        if reduced is None:
            return None
        columns, how = reduced
        due = present
    elif failure["class"] == "infra" and row.failed_attempts + 1 < settings.max_attempts:
        columns = {"failed_attempts": row.failed_attempts + 1}
        how = f"failed attempt {row.failed_attempts + 1} of at most {settings.max_attempts} in a row"
        wait_s = pause_s(settings.retry_backoff_s, row.failed_attempts, most_s=settings.retry_backoff_max_s)
        due = present + timedelta(seconds=wait_s)
    else:
        return None
    pausing = row.status == PAUSING
    when = "when its owner resumes it" if pausing else f"at {due:%Y-%m-%d %H:%M:%S} UTC"
    reason = f"{failure['class']} failure {failure['code']}: {failure['detail']}"[:15_000]
    text = f"{reason}; the next attempt starts {when}, {handler.resume_point(row)}: {how}"
    return Retry(
        PAUSED if pausing else QUEUED,
        {**columns, "not_before": None if pausing else due},
        RecordedMessage(level="warn", code="retrying", message=text),
    )


def with_advice(handler: Handler[Any], row: Leased, outcome: Outcome) -> Outcome:
    """Return the outcome; a failure gets the reason why there is no further attempt, and what to change."""
    failure = outcome.failure
    if failure is None or failure["class"] not in RETRYABLE:
        return outcome
    if failure["class"] == "oom":
        advice = handler.memory_advice(row, failure["code"])
    else:
        count = row.failed_attempts + 1
        advice = f"no further attempt, because {count} in a row failed or lost their worker" if count > 1 else ""
    return replace(outcome, failure={**failure, "detail": f"{failure['detail']}; {advice}"}) if advice else outcome
