import re
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import event, select, text, update

from app.db import Database, utcnow
from app.models import Checkpoint, Dataset, Job, Tenant, Worker
from app.queue.leases import claim_next, finish
from app.queue.scheduling import WorkerResources
from tests.support import rows as seed
from tests.support.racing import race

LEASE = {"lease_s": 600.0, "max_attempts": 5}
COMMON = {"name": "", "status": "queued", "spec": {}, "labels": {}}
START = utcnow() - timedelta(days=1)


@pytest.fixture
def dataset(database: Database) -> Dataset:
    for name in ("a", "b", "c"):
        seed.add(database, Tenant(id=f"ten_{name}", name=name))
    return seed.dataset(database, "ten_a")


def _jobs(database: Database, dataset: Dataset, *jobs: tuple[str, str, dict]) -> None:
    """Queue jobs, given as (id, tenant, values), the first one the oldest."""
    with database.write() as session:
        for age, (name, tenant, values) in enumerate(jobs):
            created_at = START + timedelta(seconds=age)
            merged = COMMON | {"dataset_id": dataset.id, "created_at": created_at} | values
            session.add(Job(id=f"job_{name}", tenant_id=f"ten_{tenant}", **merged))


def _next(database: Database, resources: WorkerResources = WorkerResources(), model=Job, owner: str = "w"):  # noqa: B008
    with database.write() as session:
        return claim_next(session, model, resources, owner=owner, **LEASE)


def _order(database: Database, resources: WorkerResources = WorkerResources(), *, finishing: bool = False) -> list[str]:  # noqa: B008
    order = []
    while row := _next(database, resources):
        order.append(row.id.removeprefix("job_"))
        if finishing:
            with database.write() as session:
                finish(session, row, status="succeeded")
    return order


def test_a_hundred_jobs_of_one_tenant_do_not_starve_anothers_one(database: Database, dataset: Dataset):
    crowd = [(f"a{n:02}", "a", {}) for n in range(100)]
    _jobs(database, dataset, *crowd, ("b", "b", {}), ("c0", "c", {}), ("c1", "c", {}))
    assert _order(database)[:6] == ["a00", "b", "c0", "a01", "c1", "a02"]


def test_tenants_take_turns_when_nothing_else_runs(database: Database, dataset: Dataset):
    _jobs(database, dataset, *[(f"a{n}", "a", {}) for n in range(4)], ("b0", "b", {}), ("b1", "b", {}))
    assert _order(database, finishing=True) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_running_jobs_count_before_age(database: Database, dataset: Dataset):
    held = {"status": "running", "lease_expires_at": utcnow() + timedelta(seconds=60)}
    _jobs(database, dataset, ("held", "a", held), ("a", "a", {}), ("b", "b", {}))
    assert _order(database) == ["b", "a"]


def test_priority_goes_before_all(database: Database, dataset: Dataset):
    _jobs(
        database,
        dataset,
        ("low", "b", {"priority": -1}),
        ("old", "a", {}),
        ("high0", "a", {"priority": 5}),
        ("high1", "a", {"priority": 5}),
        ("highest", "a", {"priority": 100}),
    )
    assert _order(database) == ["highest", "high0", "high1", "old", "low"]


@pytest.mark.parametrize(
    ("resources", "order"),
    [
        (WorkerResources(), ["plain"]),
        (WorkerResources(labels=frozenset({"lab", "fast"})), ["plain", "lab"]),
        (WorkerResources(processes=4), ["plain", "four"]),
        (WorkerResources(processes=2, gpu_memory_gb=24.0), ["plain"]),
        (WorkerResources(processes=2, gpu_memory_gb=80.0), ["plain", "large"]),
        (
            WorkerResources(processes=8, gpu_memory_gb=80.0, labels=frozenset({"lab"})),
            ["plain", "four", "large", "lab"],
        ),
    ],
)
def test_a_worker_takes_only_what_it_has_the_means_for(
    database: Database, dataset: Dataset, resources: WorkerResources, order: list[str]
):
    demands = {
        "plain": {},
        "four": {"gpus": 4},
        "large": {"gpu_memory_gb": 40.0},
        "lab": {"worker_label": "lab"},
    }
    _jobs(database, dataset, *[(name, "a", values) for name, values in demands.items()])
    assert _order(database, resources) == order
    for name, values in demands.items():
        wanted = (values.get("gpus", 1), values.get("gpu_memory_gb"), values.get("worker_label"))
        assert resources.satisfies(*wanted) == (name in order)


def test_a_lost_row_comes_before_all_that_waits(database: Database, dataset: Dataset):
    lost = {"status": "running", "lease_expires_at": utcnow() - timedelta(seconds=1), "attempt": 1}
    _jobs(
        database,
        dataset,
        ("first", "a", {"priority": 9}),
        ("lost", "a", lost),
        ("often", "a", lost | {"attempt": 9, "failed_attempts": 3}),
        ("spent", "b", lost | {"attempt": 5, "failed_attempts": 4}),
        ("ending", "b", lost | {"attempt": 5, "failed_attempts": 4, "status": "cancelling"}),
        ("resting", "b", lost | {"status": "pausing"}),
    )
    # The sweep fails the spent job and pauses the resting one.
    assert _order(database) == ["lost", "often", "ending", "first"]
    with database.read() as session:
        counted = dict(session.execute(select(Job.id, Job.failed_attempts)).all())
    assert (counted["job_lost"], counted["job_often"], counted["job_ending"], counted["job_first"]) == (1, 4, 5, 0)


def test_a_row_that_is_tried_again_later_holds_nobody_up(database: Database, dataset: Dataset):
    soon, ago = utcnow() + timedelta(seconds=60), utcnow() - timedelta(seconds=1)
    later = {"priority": 9, "not_before": soon, "attempt": 1, "failed_attempts": 1}
    _jobs(
        database,
        dataset,
        ("later", "a", later),
        ("paused", "a", {"status": "paused", "priority": 9}),
        ("plain", "a", {}),
        ("due", "a", {"not_before": ago}),
    )
    assert _order(database) == ["plain", "due"]
    with database.write() as session:
        session.execute(update(Job).where(Job.id == "job_later").values(not_before=ago))
    row = _next(database)
    assert (row.id, row.attempt, row.failed_attempts, row.not_before) == ("job_later", 2, 1, None)


def test_a_draining_worker_takes_nothing(database: Database, dataset: Dataset):
    _jobs(database, dataset, ("one", "a", {}))
    now = utcnow()
    values = {"host": "h", "queues": ["jobs"], "labels": [], "device": "cpu", "gpus": 0, "processes": 1}
    seed.add(database, Worker(id="wkr_1", name="w@h", draining=True, started_at=now, seen_at=now, **values))
    assert _next(database, WorkerResources(worker_id="wkr_1")) is None
    assert _next(database, WorkerResources(worker_id="wkr_forgotten")).id == "job_one"


def test_checks_take_turns_between_tenants(database: Database, dataset: Dataset):
    for number in range(3):
        seed.checkpoint(database, "ten_a", id=f"ckpt_a{number}", status="queued", created_at=START)
    seed.checkpoint(database, "ten_b", id="ckpt_b", status="queued")
    assert [_next(database, model=Checkpoint).id for _ in range(3)] == ["ckpt_a0", "ckpt_b", "ckpt_a1"]
    assert _next(database, model=Dataset) is None


def test_a_thousand_claims_give_each_row_once(database: Database, dataset: Dataset):
    tenants = ("a", "b", "c")
    _jobs(database, dataset, *[(f"{n:04}", tenants[n % 7 % 3], {"priority": n % 3}) for n in range(1000)])
    won: dict[int, list[str]] = {number: [] for number in range(4)}

    def _work(number: int) -> None:
        while row := _next(database, owner=f"worker-{number}"):
            won[number].append(row.id)
            with database.write() as session:
                finish(session, row, status="succeeded")

    race(_work, 4)
    claims = Counter(row_id for rows in won.values() for row_id in rows)
    assert len(claims) == 1000
    assert set(claims.values()) == {1}
    with database.read() as session:
        assert set(session.execute(select(Job.attempt, Job.status).distinct())) == {(1, "succeeded")}


def test_a_row_that_somebody_is_changing_is_passed_over(postgres_url: str):
    database = Database(postgres_url)
    seed.add(database, Tenant(id="ten_a", name="a"))
    _jobs(database, seed.dataset(database, "ten_a"), ("first", "a", {}), ("second", "a", {}))
    with database.write() as other:
        other.execute(update(Job).where(Job.id == "job_first").values(name="changed"))
        assert _next(database).id == "job_second"
        assert _next(database) is None
    assert _next(database).id == "job_first"
    database.dispose()


@pytest.mark.parametrize("analysed", ["jobs", "jobs, tenants"])
def test_a_claim_reads_few_of_many_rows(postgres_url: str, analysed: str):
    """Of 20,000 queued rows it reads one per tenant, whether or not the planner has statistics about tenants."""
    database = Database(postgres_url)
    seed.add(database, Tenant(id="ten_a", name="a"))
    seed.add(database, Tenant(id="ten_b", name="b"))
    dataset = seed.dataset(database, "ten_a")
    with database.write() as session:
        session.execute(
            text(
                "INSERT INTO jobs (id, tenant_id, name, status, attempt, created_at, dataset_id, spec, labels) "
                "SELECT 'job_' || n, CASE WHEN n % 4 = 0 THEN 'ten_a' ELSE 'ten_b' END, '', "
                "CASE WHEN n % 2 = 0 THEN 'queued' ELSE 'succeeded' END, 0, "
                "now() - n * interval '1 second', :dataset, '{}', '{}' FROM generate_series(1, 40000) n"
            ),
            {"dataset": dataset.id},
        )
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"VACUUM ANALYZE {analysed}"))
    plans: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def _explain(connection, cursor, statement, parameters, *_):
        if statement.startswith("SELECT"):
            cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF) {statement}", parameters)
            plans.append(f"{statement}\n" + "\n".join(line for (line,) in cursor.fetchall()))

    with database.write() as session:
        assert claim_next(session, Job, WorkerResources(), owner="w", **LEASE).id == "job_40000"
    for plan in plans:
        read = [int(float(count)) for count in re.findall(r"actual rows=([\d.]+)", plan)]
        left_out = [int(count) for count in re.findall(r"Rows Removed by \w+(?: \w+)?: (\d+)", plan)]
        assert max(read + left_out, default=0) < 50, plan
    assert sum("FROM jobs" in plan for plan in plans) >= 3
    database.dispose()
