from datetime import timedelta

from starlette.testclient import TestClient

from app.db import Database, utcnow
from app.models import Worker
from app.ops.sweep import sweep
from app.settings import Settings
from app.workers import registry, repository
from tests.app.conftest import RecordingQueue, Tenant
from tests.support import rows as seed


def worker(name: str = "jobs@one", **values) -> Worker:
    defaults = {
        "id": f"wkr_{name.replace('@', '')}",
        "host": name.partition("@")[2],
        "queues": ["jobs"],
        "labels": [],
        "device": "cpu",
        "gpus": 0,
        "gpu_memory_gb": None,
        "processes": 2,
        "draining": False,
        "started_at": utcnow(),
        "seen_at": utcnow(),
    }
    return Worker(name=name, **defaults | values)


def test_workers_are_listed_with_what_they_have_and_do(api: TestClient, database: Database, alice: Tenant, bob: Tenant):
    seed.add(database, worker("gpu@one", labels=["lab"], device="cuda", gpus=2, gpu_memory_gb=80.0))
    seed.add(database, worker("gpu@two"))
    seed.add(database, worker("idle@two", queues=["checks"]))
    seed.add(database, worker("silent@three", seen_at=utcnow() - timedelta(seconds=60)))
    dataset = seed.dataset(database, alice.id)
    expires = utcnow() + timedelta(seconds=30)
    held = {"status": "running", "lease_expires_at": expires, "started_at": utcnow()}
    mine = seed.job(database, alice.id, dataset.id, lease_owner="wkr_gpuone/one:12", **held)
    seed.job(database, bob.id, dataset.id, lease_owner="wkr_gputwo/two:13", **held)

    data = api.get("/v1/workers").json()["data"]

    assert [(row["name"], row["status"]) for row in data] == [
        ("gpu@one", "busy"),
        ("gpu@two", "busy"),
        ("idle@two", "idle"),
        ("silent@three", "silent"),
    ]
    assert data[0]["working_on"]["id"] == mine.id
    assert data[1]["working_on"] is None  # another tenant's
    assert {key: data[0][key] for key in ("labels", "device", "gpus", "gpu_memory_gb")} == {
        "labels": ["lab"],
        "device": "cuda",
        "gpus": 2,
        "gpu_memory_gb": 80.0,
    }


def test_the_list_needs_a_key(client: TestClient):
    assert client.get("/v1/workers").status_code == 401


def test_a_beat_registers_renews_and_keeps_draining(database: Database, settings: Settings):
    one = worker(seen_at=utcnow() - timedelta(seconds=100))
    for _ in range(2):
        with database.write() as session:
            registry.beat(session, one)
            repository.set_draining(session, one.name, True)
    with database.read() as session:
        (row,) = repository.all_workers(session)
        assert row.draining
        assert row.seen_at > utcnow() - timedelta(seconds=20)
        assert registry.present(session, settings, queue="jobs") == []


def test_a_worker_that_drains_by_its_own_will_says_so(database: Database, settings: Settings):
    one = worker()
    for draining in (False, True, False):
        with database.write() as session:
            registry.beat(session, one, draining=draining)
    with database.read() as session:
        assert [row.draining for row in repository.all_workers(session)] == [True]


def test_the_sweep_forgets_workers_that_are_silent_for_long(database: Database, settings: Settings):
    seed.add(database, worker("gone@one", seen_at=utcnow() - timedelta(seconds=601)))
    seed.add(database, worker("late@one", seen_at=utcnow() - timedelta(seconds=500)))
    sweep(database, RecordingQueue(), settings)
    with database.read() as session:
        assert [row.name for row in repository.all_workers(session)] == ["late@one"]


def test_the_operator_drains_by_name(database: Database, settings: Settings, admin):
    seed.add(database, worker())
    assert admin("workers", "--drain", "jobs@one")[0] == 0
    code, out, _ = admin("workers", "--list")
    assert code == 0
    assert "jobs@one\tjobs\t0 GPUs\tdraining\tseen " in out
    assert admin("workers", "--undrain", "jobs@one")[0] == 0
    with database.read() as session:
        assert len(registry.present(session, settings, queue="jobs")) == 1
    code, _, error = admin("workers", "--drain", "nobody")
    assert code == 1
    assert "there is no worker 'nobody'; the workers are: jobs@one" in error
    for arguments in ([], ["--list", "--drain", "jobs@one"], ["--drain", "a", "--undrain", "b"]):
        assert admin("workers", *arguments)[0] == 2
