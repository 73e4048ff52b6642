"""A queued job's position, what it waits for, and its expected start, by the same order as claims."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain, islice
from typing import Any

from sqlalchemy import Row, exists, select
from sqlalchemy.orm import Session

from app.db import now
from app.jobs.durations import Durations, Spread
from app.jobs.schemas import QueueOut
from app.models import Job, Tenant, Worker
from app.queue.scheduling import WorkerResources, due, in_work, served
from app.settings import Settings
from app.states import QUEUED
from app.workers import registry, repository

LOOK = 200
"""The number of queued jobs that are considered; a job behind them has no position."""

_ORDER: tuple[Any, ...] = (Job.id, Job.priority, Job.created_at, Job.not_before)
_NEEDS: tuple[Any, ...] = (Job.gpus, Job.gpu_memory_gb, Job.worker_label, Job.recipe, Job.workload)


@dataclass
class _Slot:
    """A worker, and the seconds until it is free: infinite if unknown."""

    resources: WorkerResources
    free_in: float


class Waiting:
    """The queue of jobs as it is now, for one request; it reads each part at first use."""

    def __init__(self, session: Session, settings: Settings) -> None:
        self._session = session
        self._settings = settings
        self._durations = Durations(session)

    def of(self, job: Job) -> QueueOut | None:
        """Return the state of a queued job in the queue; None for a job that is not queued."""
        if job.status != QUEUED:
            return None
        ahead = self._place.get(job.id)
        etas = self._starts_in(job, ahead) if ahead is not None else None
        return QueueOut(
            position=None if ahead is None else ahead + 1,
            jobs_ahead=LOOK if ahead is None else ahead,
            waiting_for=self._waits_for(job),
            eta_s=etas and etas[1],
            eta_low_s=etas and etas[0],
            eta_high_s=etas and etas[2],
        )

    @cached_property
    def _now(self) -> datetime:
        return now(self._session)

    # ---- the order ----

    @cached_property
    def _order(self) -> list[Row[Any]]:
        """The first queued rows, in the order of their claims if no row is added or ends meanwhile."""
        return list(islice(chain(self._merged(), self._later()), LOOK))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {row.id: place for place, row in enumerate(self._order)}

    def _merged(self) -> Iterator[Row[Any]]:
        """Yield rows: each time the first of the tenant whose turn it is, which then has one more row in work."""
        waits = exists(select(Job.id).where(Job.status == QUEUED, Job.tenant_id == Tenant.id))
        tenants = self._session.execute(select(Tenant.id, served(Job)).where(waits)).all()
        queues = [self._rows(tenant.id) for tenant in tenants]
        held = in_work(self._session, Job)
        turns: list[tuple[Any, ...]] = []

        def _enter(number: int, working: int, last_served: Any) -> None:
            if (row := next(queues[number], None)) is not None:
                heapq.heappush(turns, (-row.priority, working, last_served, row.created_at, row.id, number, row))

        for number, tenant in enumerate(tenants):
            last = (tenant.served_at is not None, tenant.served_at or self._now)
            _enter(number, held.get(tenant.id, 0), last)
        picked = 0
        while turns:
            _, working, _, _, _, number, row = heapq.heappop(turns)
            yield row
            picked += 1
            _enter(number, working + 1, (True, self._now, picked))

    def _rows(self, tenant_id: str) -> Iterator[Row[Any]]:
        mine = select(*_ORDER, *_NEEDS).where(Job.status == QUEUED, Job.tenant_id == tenant_id, due(Job, self._now))
        yield from self._session.execute(mine.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(LOOK))

    def _later(self) -> Iterator[Row[Any]]:
        """Yield the rows that wait for a retry; all rows that are due come before them."""
        later = select(*_ORDER, *_NEEDS).where(Job.status == QUEUED, Job.not_before > self._now)
        yield from self._session.execute(later.order_by(Job.not_before, Job.id).limit(LOOK))

    # ---- what it waits for ----

    @cached_property
    def _workers(self) -> Sequence[Worker]:
        return registry.present(self._session, self._settings, queue=Job.QUEUE)

    def _waits_for(self, job: Job) -> str:
        if job.not_before is not None and job.not_before > self._now:
            return f"retry at {job.not_before:%Y-%m-%dT%H:%M:%SZ}"
        workers = [WorkerResources.of(worker) for worker in self._workers]
        if not workers:
            return f"a worker; none is running for queue `{Job.QUEUE}`"
        if any(worker.satisfies(job.gpus, job.gpu_memory_gb, job.worker_label) for worker in workers):
            return "a free worker"
        return _missing(job, workers)

    # ---- when it starts ----

    def _starts_in(self, job: Job, ahead: int) -> Spread | None:
        low, median, high = (self._simulated(job, ahead, quartile) for quartile in range(3))
        return (low, median, high) if math.isfinite(high) and math.isfinite(median) and math.isfinite(low) else None

    def _simulated(self, job: Job, ahead: int, quartile: int) -> float:
        """Assign each row in turn to the worker that is free first; return the seconds until this job starts."""
        slots = [_Slot(WorkerResources.of(worker), self._free_in(worker, quartile)) for worker in self._workers]
        for row in self._order[:ahead]:
            slot = _first_free(slots, row)
            if slot is not None:
                duration = self._durations.of(row.recipe, row.workload)
                starts_in = max(slot.free_in, self._due_in(row.not_before))
                slot.free_in = starts_in + (math.inf if duration is None else duration[quartile])
        mine = _first_free(slots, job)
        return math.inf if mine is None else max(mine.free_in, self._due_in(job.not_before))

    def _due_in(self, not_before: datetime | None) -> float:
        """Return the seconds until a row with this `not_before` may start."""
        return 0.0 if not_before is None else max(0.0, (not_before - self._now).total_seconds())

    @cached_property
    def _held(self) -> Mapping[str, Any]:
        return repository.held_rows(self._session)

    def _free_in(self, worker: Worker, quartile: int) -> float:
        """Return the seconds until the worker is free: by its run's estimate, else by the duration of similar jobs."""
        row = self._held.get(worker.id)
        if not isinstance(row, Job):  # no row, or a check, which ends soon
            return 0.0
        eta_s = (row.progress or {}).get("eta_s")
        if eta_s is not None:
            return max(0.0, float(eta_s))
        duration = self._durations.of(row.recipe, row.workload)
        if duration is None or row.started_at is None:
            return math.inf
        return max(0.0, duration[quartile] - (self._now - row.started_at).total_seconds())


def _first_free(slots: Sequence[_Slot], row: Any) -> _Slot | None:
    able = [slot for slot in slots if slot.resources.satisfies(row.gpus, row.gpu_memory_gb, row.worker_label)]
    return min(able, key=lambda slot: slot.free_in, default=None)


def _missing(job: Job, workers: Sequence[WorkerResources]) -> str:
    """Name the requested resources that no worker has; if no single worker has all of them, name all."""
    demands: list[tuple[str, tuple[int, float | None, str | None]]] = [
        ("1 GPU" if job.gpus == 1 else f"{job.gpus} GPUs", (job.gpus, None, None))
    ]
    if job.gpu_memory_gb is not None:
        demands.append((f"a GPU with {job.gpu_memory_gb:g} GB", (0, job.gpu_memory_gb, None)))
    if job.worker_label is not None:
        demands.append((f"a worker with label {job.worker_label}", (0, None, job.worker_label)))
    nowhere = [name for name, wants in demands if not any(worker.satisfies(*wants) for worker in workers)]
    return " and ".join(nowhere or [name for name, _ in demands])
