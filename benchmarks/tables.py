"""Pages and claims with large tables against the same with small ones, in PostgreSQL.

    python -m benchmarks.tables [--quick] [--jobs 1000000] [--points 100000000]

Two databases on one server, both created by the migrations: one with 1,000 jobs and one with many, with the same number
of metric points, events, evaluations and artifacts per job. Each request is timed as in the service, from a new session
to the answer's model, for random tenants, datasets and jobs. The two databases take turns, and medians are compared.
Points that the disk has no room for are left out; the result has their actual number. TEST_DATABASE_URL names a server
(its role must be a superuser: foreign keys are not checked while loading); without it one is started.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
from sqlalchemy import text, update
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from app.artifacts import service as artifacts
from app.artifacts.schemas import ArtifactOut
from app.db import Database, update_count
from app.http.auth import Caller
from app.http.pagination import PageQuery, encode_cursor, page_of
from app.jobs import repository, service
from app.jobs.schemas import EvaluationOut, JobOut
from app.migrate import upgrade
from app.models import Job
from app.queue import leases
from app.queue.scheduling import WorkerResources
from tests.support import postgres

GOAL: Final = 1.5
SMALL: Final = 1000
TENANTS, DATASETS = 5, 2  # datasets of each tenant
STATUSES: Final = ["queued"] * 2 + ["running"] + ["succeeded"] * 60 + ["failed"] * 30 + ["cancelled"] * 7
STUDIED: Final = 40
"""Jobs whose page is requested: each has a thousand points, whatever the others have."""
STUDIED_POINTS: Final = 1000
POINT_BYTES: Final = 320
"""The measured size on disk of a point with its index entry."""
FREE_SHARE: Final = 0.5
START: Final = datetime(2025, 1, 1, tzinfo=UTC)
LIMIT: Final = 20

_DETECTOR = {
    "architecture": "faster_rcnn",
    "backbone": "timm/resnet10t",
    "strides": [8, 16, 32],
    "pyramid_channels": 256,
    "input": {"shorter_side": 480, "longer_side": 640},
    "frozen_batch_norm": False,
    "freeze_stages": 0,
}
_SCHEDULE = {"epochs": 12, "batch_size": 8, "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0001}
SPEC: Final = {
    "name": "cells-small",
    "teacher": {"source": "train", "detector": _DETECTOR, "initial_weights": "random", "schedule": _SCHEDULE},
    "student": {"detector": _DETECTOR, "initial_weights": "random"},
    "distillation": {"method": "defeat", "neck_object_weight": 4.0, "neck_background_weight": 1.0, "temperature": 1.0},
    "schedule": _SCHEDULE,
    "evaluation": {"split": "val", "every_epochs": 1},
    "augmentation": {"horizontal_flip": 0.5},
    "resources": {"gpus": 1},
    "seed": 0,
}
POINT: Final = {"loss/total": 1.234567, "loss/neck": 0.234567, "learning_rate": 0.01, "images_per_s": 20.125}
EVALUATION: Final = {"ap": 0.3, "ap50": 0.5, "ap75": 0.2, "per_class": [], "images": 100, "detections": 1000}

# Numbers become ids and times in the database, so that nothing is sent to it but these statements.
FILL: Final = """
INSERT INTO tenants (id, name, created_at)
SELECT 'ten_' || n, 'tenant ' || n, now() FROM generate_series(0, {tenants} - 1) n;

INSERT INTO datasets (id, tenant_id, name, status, attempt, created_at, source, max_dropped_fraction)
SELECT 'ds_' || n, 'ten_' || mod(n, {tenants}), 'cells', 'ready', 1, now(), '{{}}', 0
FROM generate_series(0, {tenants} * {datasets} - 1) n;

INSERT INTO jobs (id, tenant_id, name, status, attempt, created_at, enqueued_at, started_at, finished_at, lease_owner,
    lease_expires_at, dataset_id, spec, labels)
SELECT 'job_' || lpad(n::text, 26, '0'), 'ten_' || mod(n, {tenants}), 'job ' || n, status, (status <> 'queued')::int,
    at, now(), CASE WHEN status <> 'queued' THEN at END, CASE WHEN status NOT IN ('queued', 'running') THEN at END,
    CASE WHEN status = 'running' THEN 'worker' END, CASE WHEN status = 'running' THEN now() + INTERVAL '1 day' END,
    'ds_' || mod(n, {tenants} * {datasets}), %(spec)s::jsonb, '{{}}'
FROM (
    SELECT n, TIMESTAMPTZ '2025-01-01T00:00:00Z' + n * INTERVAL '1 second' AS at,
        (%(statuses)s::text[])[1 + mod(n / {tenants} * 37, 100)] AS status
    FROM generate_series(0, {jobs} - 1) n
) made;

INSERT INTO job_events (job_id, level, code, message, created_at)
SELECT 'job_' || lpad(n::text, 26, '0'), 'info', 'claimed', 'a worker has begun', now()
FROM generate_series(0, {jobs} - 1) n, generate_series(1, 3) number;

INSERT INTO job_evaluations (job_id, subject, epoch, metrics)
SELECT 'job_' || lpad(n::text, 26, '0'), 'student', epoch, %(evaluation)s::jsonb
FROM generate_series(0, {jobs} - 1) n, generate_series(0, 1) epoch;

INSERT INTO artifacts (id, job_id, name, kind, content_type, storage_key, size_bytes, sha256, details, created_at)
SELECT 'art_' || n || '_' || number, 'job_' || lpad(n::text, 26, '0'), number || '.log', 'log', 'text/plain',
    'jobs/' || n || '/' || number, 5, repeat('0', 64), '{{}}', now()
FROM generate_series(0, {jobs} - 1) n, generate_series(1, 2) number
"""
POINTS: Final = """
INSERT INTO job_metrics (job_id, subject, step, epoch, values)
SELECT 'job_' || lpad(n::text, 26, '0'), 'student', step, step, %(point)s::jsonb
FROM generate_series({begin}, {end} - 1) n, generate_series(1, {each}) step
ON CONFLICT DO NOTHING
"""


def _job_id(number: int) -> str:
    return f"job_{number:026}"


def _studied(jobs: int) -> list[int]:
    """Return the numbers of the studied jobs: spread over the table."""
    return [index * jobs // STUDIED for index in range(STUDIED)]


def fill(connection: psycopg.Connection, jobs: int, points_each: int) -> None:
    """Insert the rows of an installation with so many jobs, and print how long it took."""
    start = time.perf_counter()
    connection.execute("SET session_replication_role = replica")  # no foreign key checks
    documents = {"spec": SPEC, "evaluation": EVALUATION, "point": POINT}
    values: dict[str, Any] = {name: json.dumps(value) for name, value in documents.items()} | {"statuses": STATUSES}
    for statement in FILL.split(";"):
        connection.execute(statement.format(tenants=TENANTS, datasets=DATASETS, jobs=jobs), values)
    for number in _studied(jobs):
        studied = {"begin": number, "end": number + 1, "each": STUDIED_POINTS}
        connection.execute(POINTS.format(**studied), values)
    step = 50_000
    for begin in range(0, jobs if points_each else 0, step):
        part = {"begin": begin, "end": min(begin + step, jobs), "each": points_each}
        connection.execute(POINTS.format(**part), values)
    connection.execute("VACUUM ANALYZE")
    print(f"{jobs} jobs with {points_each} points each: made in {time.perf_counter() - start:.0f} s", flush=True)


class Installation:
    """A filled database and the requests that are timed; `at`, from 0 to 1, chooses each one's target."""

    def __init__(self, url: str, jobs: int) -> None:
        self.database = Database(url)
        self._jobs = jobs
        self._studied = _studied(jobs)

    def _page(self, at: float, after: str | None = None, **filters: Any) -> None:
        tenant = int(at * self._jobs) % TENANTS
        with self.database.read() as session:
            statement = repository.of_tenant(f"ten_{tenant}", **filters)
            rows, _ = page_of(session, statement, Job, PageQuery(limit=LIMIT, after=after))
            page = [JobOut.of(row) for row in rows]
        if len(page) != LIMIT:
            raise AssertionError(f"a page of {len(page)} jobs: {filters}, after {after}")

    def first_page(self, at: float) -> None:
        """The newest jobs of a tenant."""
        self._page(at)

    def later_page(self, at: float) -> None:
        """A page from anywhere in the list."""
        number = int((0.2 + 0.8 * at) * self._jobs)
        self._page(at, encode_cursor(START + timedelta(seconds=number), _job_id(number)))

    def status_page(self, at: float) -> None:
        """The newest jobs of one state."""
        self._page(at, status="failed")

    def dataset_page(self, at: float) -> None:
        """The newest jobs on one dataset."""
        tenant = int(at * self._jobs) % TENANTS
        self._page(at, dataset_id=f"ds_{tenant}")

    def name_page(self, at: float) -> None:
        """The newest jobs with a text in their name that all names contain."""
        self._page(at, name="JOB")

    def rare_name_page(self, at: float) -> None:
        """Jobs with a text in their name that no name contains: all of the tenant's are scanned."""
        tenant = int(at * self._jobs) % TENANTS
        with self.database.read() as session:
            statement = repository.of_tenant(f"ten_{tenant}", name="no job is called so")
            page_of(session, statement, Job, PageQuery(limit=LIMIT, after=None))

    def job_page(self, at: float) -> None:
        """The requests of the page of one job."""
        number = self._studied[int(at * STUDIED)]
        caller, job_id = Caller(f"ten_{number % TENANTS}", "key", max_priority=0), _job_id(number)
        with self.database.read() as session:
            JobOut.of(service.get(session, caller, job_id))
            service.list_events(session, caller, job_id, after=None, limit=100)
            points = service.list_metrics(session, caller, job_id, subject="student", after_step=-1, limit=1000)
            _ = [EvaluationOut.model_validate(row) for row in repository.evaluations(session, job_id)]
            _ = [ArtifactOut.of(row) for row in artifacts.list_all(session, caller, job_id)]
        if len(points.data) != STUDIED_POINTS:
            raise AssertionError(f"{job_id} has {len(points.data)} points")

    def claim(self, at: float) -> None:
        """A worker claims the next job, which is then queued again, untimed: see `put_back`."""
        del at
        with self.database.write() as session:
            row = leases.claim_next(session, Job, WorkerResources(), owner="benchmark", lease_s=30, max_attempts=5)
        if row is None:
            raise AssertionError("there was no job to claim")

    def put_back(self) -> None:
        """Queue the job again that `claim` took."""
        back = {"status": "queued", "lease_owner": None, "lease_expires_at": None, "started_at": None, "attempt": 0}
        with self.database.write() as session:
            update_count(
                session, update(Job).where(Job.status == Job.CLAIMED, Job.lease_owner == "benchmark").values(**back)
            )

    def sweep(self, at: float) -> None:
        """Search for lost rows; there are none."""
        del at
        with self.database.write() as session:
            lost = leases.find_lost(session, redeliver_s=86_400, max_attempts=5)
        if lost:
            raise AssertionError(f"{len(lost)} rows are lost")


REQUESTS: Final[dict[str, Callable[[Installation, float], None]]] = {
    "first_page": Installation.first_page,
    "status_page": Installation.status_page,
    "dataset_page": Installation.dataset_page,
    "name_page": Installation.name_page,
    "job_page": Installation.job_page,
    "claim": Installation.claim,
}
BESIDES: Final[dict[str, Callable[[Installation, float], None]]] = {
    "later_page": Installation.later_page,
    "sweep": Installation.sweep,
    "rare_name_page": Installation.rare_name_page,
}
"""Timed in a few turns and reported, but not part of the goal: a random page of a table larger than the server's memory
is read from the disk, the sweep's work grows with the queue, and a rare text is searched in every name."""
BESIDES_TURNS: Final = 20


def measure(installations: list[Installation], turns: int, seed: int = 0) -> dict[str, list[float]]:
    """Return each request's median time at each installation, in ms. The first fifth of the turns warms up."""
    chance = random.Random(seed)  # noqa: S311  # chooses requests, nothing secret
    times: dict[str, list[list[float]]] = {name: [[] for _ in installations] for name in (REQUESTS | BESIDES)}
    for turn in range(turns + turns // 5):
        requests = REQUESTS if turn < turns + turns // 5 - BESIDES_TURNS else REQUESTS | BESIDES
        for name, request in requests.items():
            at = chance.random()
            for index in chance.sample(range(len(installations)), len(installations)):
                start = time.perf_counter()
                request(installations[index], at)
                took = time.perf_counter() - start
                if turn >= turns // 5:
                    times[name][index].append(took * 1000)
                if name == "claim":
                    installations[index].put_back()
    return {name: [statistics.median(series) for series in both] for name, both in times.items()}


@contextmanager
def _installation(server: str, name: str, jobs: int, points_each: int) -> Iterator[Installation]:
    with psycopg.connect(postgres.driver_url(server), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        url = make_url(server).set(database=name).render_as_string(hide_password=False)
        upgrade(url)
        with psycopg.connect(postgres.driver_url(url), autocommit=True) as connection:
            fill(connection, jobs, points_each)
        installation = Installation(url, jobs)
        yield installation
        installation.database.dispose()
    finally:
        with psycopg.connect(postgres.driver_url(server), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    parser = argparse.ArgumentParser(description="Large tables against small ones.")
    parser.add_argument("--quick", action="store_true", help="50,000 jobs and 500,000 points, fewer turns")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="jobs of the large installation")
    parser.add_argument("--points", type=int, default=100_000_000, help="metric points of the large installation")
    options = parser.parse_args(arguments)
    jobs, asked, turns = (50_000, 500_000, 40) if options.quick else (options.jobs, options.points, 200)
    room = int(shutil.disk_usage(tempfile.gettempdir()).free * FREE_SHARE) // POINT_BYTES
    each = min(asked, room) // jobs
    with (
        postgres.server() as server,
        _installation(server, "defeat_small", SMALL, each) as small,
        _installation(server, "defeat_large", jobs, each) as large,
    ):
        with large.database.read() as session:
            points = _estimate(session, "job_metrics")
        medians = measure([small, large], turns)
    ratios = {name: both[1] / both[0] for name, both in medians.items()}
    worst = max(ratios[name] for name in REQUESTS)
    result = {
        "benchmark": "tables",
        "ratio": round(worst, 2),
        "goal": GOAL,
        "ok": bool(worst <= GOAL),
        "jobs": [SMALL, jobs],
        "points": points,
        "points_asked": asked,
        "ms": {name: [round(value, 2) for value in both] for name, both in medians.items()},
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
    }
    print(json.dumps(result))
    return result


def _estimate(session: Session, table: str) -> int:
    """Return PostgreSQL's estimate of a table's rows, as of the last VACUUM."""
    return int(session.scalar(text("SELECT reltuples FROM pg_class WHERE relname = :table"), {"table": table}) or 0)


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
