"""Reduces the history of ended jobs: metrics to evenly spread points, events to warnings, errors and the newest."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Final

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app.db import update_count, utcnow
from app.models import Job, JobEvent, JobMetric
from app.retention.rules import Removed, take
from app.settings import Settings
from app.states import JOB_TERMINAL
from app.storage import Storage

JOBS: Final = 20
ROWS: Final = 100_000
"""Number of deleted rows after which a transaction ends; the next pass goes on."""


def reduce_history(session: Session, storage: Storage, settings: Settings, before: datetime) -> Removed:
    """Reduce the histories of jobs that ended before `before`. The first and last point of each series stay."""
    del storage
    ended = (Job.status.in_(JOB_TERMINAL), Job.finished_at < before, Job.history_swept_at.is_(None))
    jobs = take(session, Job, *ended, limit=JOBS)
    left, reduced = ROWS, []
    for job in jobs:
        removed = _reduce_events(session, job.id, settings.history_points)
        removed += _reduce_metrics(session, job.id, settings.history_points, left)
        left -= removed
        if removed:
            reduced.append(job.id)
        if left <= 0:
            break
        job.history_swept_at = utcnow()
    session.flush()
    return Removed(reduced, left <= 0 or len(jobs) == JOBS)


def _reduce_events(session: Session, job_id: str, kept: int) -> int:
    """Delete a job's events of level info, except among its last `kept` events."""
    newest = select(JobEvent.id).where(JobEvent.job_id == job_id).order_by(JobEvent.id.desc()).limit(1).offset(kept - 1)
    oldest_kept = session.scalar(newest)
    if oldest_kept is None:
        return 0
    notices = (JobEvent.job_id == job_id, JobEvent.id < oldest_kept, JobEvent.level == "info")
    return update_count(session, delete(JobEvent).where(*notices))


def _reduce_metrics(session: Session, job_id: str, points: int, at_most: int) -> int:
    removed = 0
    subjects = session.scalars(select(JobMetric.subject).where(JobMetric.job_id == job_id).distinct()).all()
    for subject in subjects:
        for after, until in pairwise(_kept_steps(session, job_id, subject, points)):
            if removed >= at_most:
                return removed
            series = (JobMetric.job_id == job_id, JobMetric.subject == subject)
            removed += update_count(
                session, delete(JobMetric).where(*series, JobMetric.step.between(after + 1, until - 1))
            )
    return removed


def _kept_steps(session: Session, job_id: str, subject: str, points: int) -> Sequence[int]:
    """Return the steps of `points` evenly spread points, with the first and the last; empty for a shorter series."""
    series = (JobMetric.job_id == job_id, JobMetric.subject == subject)
    count = session.scalar(select(func.count()).select_from(JobMetric).where(*series)) or 0
    if count <= points:
        return ()
    number = (func.row_number().over(order_by=JobMetric.step) - 1).label("number")
    numbered = select(JobMetric.step, number).where(*series).subquery()
    # Point i of `points` is row i * (count - 1) // (points - 1), rounded down: distinct, as there are more rows.
    wanted = [index * (count - 1) // (points - 1) for index in range(points)]
    return session.scalars(select(numbered.c.step).where(numbered.c.number.in_(wanted)).order_by(numbered.c.step)).all()
