"""Whether another attempt may end better than the one that failed, and what people are told.

The machine's failures (`infra`) pass: they are tried again, each time after a longer pause. Memory (`oom`) does not
grow, so it is tried again once, with less of the batch at a time. The spec's and the data's failures stay.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from app.models import Leased
from app.settings import Settings
from app.states import PAUSED, PAUSING, QUEUED
from worker.rundir import Message
from worker.tasks.base import Adapter, Outcome

PASSING = frozenset({"infra", "oom"})
"""Classes of failure after which another attempt may end better."""


@dataclass(frozen=True)
class Again:
    """Another attempt: the row's status and what else changes in it, and what people are told."""

    status: str
    values: dict[str, Any]
    message: Message


def worker_error(error: Exception) -> Outcome:
    """Return what a failure of the worker itself is called."""
    if isinstance(error, OSError):
        return Outcome.failed("infra", "worker_disk", f"the worker's scratch directory failed: {error}")
    detail = f"unexpected {type(error).__name__} in the worker; its log has the details"
    return Outcome.failed("infra", "worker_error", detail)


def another(
    adapter: Adapter[Any], row: Leased, failure: dict[str, Any], settings: Settings, *, present: datetime
) -> Again | None:
    """Return what lets a row that failed just now be tried again, None if its failure stands.

    A job that is to be paused waits for its owner instead of the clock. `row` is as it is at `present`, by the
    database's clock.
    """
    if failure["class"] == "oom":
        lighter = adapter.lighten(row)
        if lighter is None:
            return None
        columns, how = lighter
        due = present
    elif failure["class"] == "infra" and row.losses + 1 < settings.max_attempts:
        columns = {"losses": row.losses + 1}
        how = f"failure {row.losses + 1} of at most {settings.max_attempts} in a row"
        wait_s = pause_s(settings.retry_backoff_s, row.losses, most_s=settings.retry_backoff_max_s)
        due = present + timedelta(seconds=wait_s)
    else:
        return None
    pausing = row.status == PAUSING
    when = "when it is resumed" if pausing else f"at {due:%Y-%m-%d %H:%M:%S} UTC"
    reason = f"{failure['class']} failure {failure['code']}: {failure['detail']}"[:15_000]
    text = f"{reason}; it is tried again {when}, {adapter.goes_on(row)}: {how}"
    return Again(
        PAUSED if pausing else QUEUED,
        {**columns, "not_before": None if pausing else due},
        Message(level="warn", code="retrying", message=text),
    )


def pause_s(first_s: float, before: int, *, most_s: float) -> float:
    """Return the pause after a failure, seconds: `first_s`, doubled for each failure in a row `before` this one."""
    return min(first_s * 2.0 ** min(before, 60), most_s)


def explained(adapter: Adapter[Any], row: Leased, outcome: Outcome) -> Outcome:
    """Return the outcome with a failure that says why it is not tried again, and what would do."""
    failure = outcome.failure
    if failure is None or failure["class"] not in PASSING:
        return outcome
    if failure["class"] == "oom":
        hint = adapter.memory_hint(row, failure["code"])
    else:
        count = row.losses + 1
        hint = f"given up after {count} attempts in a row that ended so or lost their worker" if row.losses else ""
    return replace(outcome, failure={**failure, "detail": f"{failure['detail']}; {hint}"}) if hint else outcome
