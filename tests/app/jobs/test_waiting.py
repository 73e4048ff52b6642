from datetime import timedelta

import pytest
from starlette.testclient import TestClient

from app.db import Database, utcnow
from app.jobs.durations import Durations, recipe_of, workload_of
from app.jobs.waiting import LOOK, Waiting
from app.models import ApiKey, Dataset, Job
from app.settings import Settings
from tests.app.conftest import ONE_DATABASE, Tenant
from tests.app.jobs.test_endpoints import SPEC
from tests.app.workers.test_workers import worker
from tests.support import rows as seed

RECIPE = {"recipe": "r", "workload": 100.0}


@pytest.fixture
def dataset(database: Database, alice: Tenant) -> Dataset:
    return seed.dataset(database, alice.id)


def _past(database: Database, dataset: Dataset, *seconds: float, workload: float = 100.0, **values) -> None:
    for taken in seconds:
        end = utcnow()
        times = {"started_at": end - timedelta(seconds=taken), "finished_at": end}
        done = {"status": "succeeded", "attempt": 1, "recipe": "r", "workload": workload} | times
        seed.job(database, dataset.tenant_id, dataset.id, **done | values)


def _queue(api: TestClient, job: Job) -> dict:
    return api.get(f"/v1/jobs/{job.id}").json()["queue"]


def _running(database: Database, dataset: Dataset, owner: str, **values) -> Job:
    held = {"status": "running", "lease_expires_at": utcnow() + timedelta(seconds=30), "started_at": utcnow()}
    return seed.job(database, dataset.tenant_id, dataset.id, lease_owner=f"{owner}/one:1", **held | values)


def test_places_are_the_order_of_claims(api: TestClient, database: Database, dataset: Dataset, bob: Tenant):
    mine = [seed.job(database, dataset.tenant_id, dataset.id) for _ in range(3)]
    other = seed.job(database, bob.id, dataset.id)
    last = seed.job(database, dataset.tenant_id, dataset.id, priority=-1)
    first = seed.job(database, dataset.tenant_id, dataset.id, priority=1)
    places = {job.id: _queue(api, job)["position"] for job in [first, *mine, last]}
    # `first` begins, so the other tenant is before the rest; then both take turns, as long as both have jobs.
    assert places == {first.id: 1, mine[0].id: 3, mine[1].id: 4, mine[2].id: 5, last.id: 6}
    with database.read() as session:
        assert Waiting(session, Settings()).of(other).jobs_ahead == 1
    listed = {row["id"]: row["queue"]["position"] for row in api.get("/v1/jobs").json()["data"]}
    assert listed == places


@ONE_DATABASE
def test_of_a_long_queue_only_so_much_is_said(api: TestClient, database: Database, dataset: Dataset):
    with database.write() as session:
        common = {"tenant_id": dataset.tenant_id, "dataset_id": dataset.id, "name": "", "status": "queued"}
        for number in range(LOOK + 1):
            session.add(Job(id=f"job_{number:04}", spec={}, labels={}, **common))
    waiting = {"waiting_for": "a worker; none is running for queue `jobs`"}
    nothing = {"eta_s": None, "eta_low_s": None, "eta_high_s": None}
    with database.read() as session:
        found = [Waiting(session, Settings()).of(session.get_one(Job, f"job_{n:04}")) for n in (LOOK - 1, LOOK)]
    assert found[0].model_dump() == {"position": LOOK, "jobs_ahead": LOOK - 1} | waiting | nothing
    assert found[1].model_dump() == {"position": None, "jobs_ahead": LOOK} | waiting | nothing


@ONE_DATABASE
@pytest.mark.parametrize(
    ("demands", "reason"),
    [
        ({}, "a free worker"),
        ({"gpus": 2}, "a free worker"),
        ({"gpus": 3}, "3 GPUs"),
        ({"worker_label": "x"}, "a worker with label x"),
        ({"worker_label": "cold"}, "a free worker"),
        ({"gpu_memory_gb": 80.0}, "a GPU with 80 GB"),
        ({"gpus": 2, "worker_label": "cold"}, "2 GPUs and a worker with label cold"),
        ({"gpus": 4, "worker_label": "x"}, "4 GPUs and a worker with label x"),
        ({"worker_label": "away"}, "a worker with label away"),
    ],
)
def test_a_job_says_what_it_waits_for(api: TestClient, database: Database, dataset: Dataset, demands, reason: str):
    seed.add(database, worker("one@a", device="cuda", gpus=2, processes=2, gpu_memory_gb=24.0))
    seed.add(database, worker("two@a", processes=1, labels=["cold"]))
    seed.add(database, worker("three@a", labels=["away"], draining=True))
    seed.add(database, worker("four@a", labels=["away"], seen_at=utcnow() - timedelta(seconds=90)))
    seed.add(database, worker("five@a", labels=["away"], queues=["checks"]))
    assert _queue(api, seed.job(database, dataset.tenant_id, dataset.id, **demands))["waiting_for"] == reason


def test_it_begins_when_the_jobs_ahead_have_ended(api: TestClient, database: Database, dataset: Dataset):
    _past(database, dataset, 10, 20, 30, 40, 50)
    seed.add(database, worker("one@a"))
    _running(database, dataset, "wkr_onea", progress={"phase": "distillation", "eta_s": 7.0})
    jobs = [seed.job(database, dataset.tenant_id, dataset.id, **RECIPE | {"workload": size}) for size in (200.0, 1.0)]
    first, second = (_queue(api, job) for job in jobs)
    assert [first[name] for name in ("eta_low_s", "eta_s", "eta_high_s")] == [7, 7, 7]
    # The one ahead has twice the images of those that took 20, 30 and 40 s: quartiles of 10, 20, …, 50.
    etas = [second[name] for name in ("eta_low_s", "eta_s", "eta_high_s")]
    assert etas == pytest.approx([7 + 40, 7 + 60, 7 + 80], abs=0.01)


def test_two_workers_share_the_queue_and_what_cannot_run_holds_nobody_up(
    api: TestClient, database: Database, dataset: Dataset
):
    _past(database, dataset, 30, 30, 30)
    seed.add(database, worker("one@a"))
    seed.add(database, worker("two@a"))
    _running(database, dataset, "wkr_onea", started_at=utcnow() - timedelta(seconds=20), **RECIPE)  # for 10 s more
    seed.job(database, dataset.tenant_id, dataset.id, worker_label="nowhere", **RECIPE)
    jobs = [seed.job(database, dataset.tenant_id, dataset.id, **RECIPE) for _ in range(3)]
    etas = [_queue(api, job)["eta_s"] for job in jobs]
    assert etas == pytest.approx([0, 10, 30], abs=2)


def test_what_is_tried_again_later_is_behind_what_may_begin(api: TestClient, database: Database, dataset: Dataset):
    _past(database, dataset, 10, 10, 10)
    seed.add(database, worker("one@a"))
    due = utcnow() + timedelta(seconds=100)
    later = seed.job(database, dataset.tenant_id, dataset.id, **RECIPE, priority=9, not_before=due)
    plain = [seed.job(database, dataset.tenant_id, dataset.id, **RECIPE) for _ in range(2)]
    places = [_queue(api, job) for job in (*plain, later)]
    assert [place["position"] for place in places] == [1, 2, 3]
    assert [place["eta_s"] for place in places] == pytest.approx([0, 10, 100], abs=2)
    assert [place["waiting_for"] for place in places[1:]] == ["a free worker", f"retry at {due:%Y-%m-%dT%H:%M:%SZ}"]


@pytest.mark.parametrize("known", [{"recipe": "other"}, {"recipe": None}, {"workload": None}])
def test_where_nothing_was_learned_there_is_no_eta(api: TestClient, database: Database, dataset: Dataset, known):
    _past(database, dataset, 10, 20, 30)
    seed.add(database, worker("one@a"))
    seed.job(database, dataset.tenant_id, dataset.id, **RECIPE | known)
    assert _queue(api, seed.job(database, dataset.tenant_id, dataset.id, **RECIPE))["eta_s"] is None


def test_only_whole_runs_teach(database: Database, dataset: Dataset):
    _past(database, dataset, 10, 20)
    _past(database, dataset, 999, attempt=2)
    _past(database, dataset, 999, status="failed")
    with database.read() as session:
        assert Durations(session).of("r", 100.0) is None
    _past(database, dataset, 60, workload=200.0)
    with database.read() as session:
        assert Durations(session).of("r", 10.0) == pytest.approx((1.5, 2.0, 2.5), rel=1e-3)


def test_alike_are_jobs_of_the_same_detectors_and_methods(api: TestClient, dataset: Dataset):
    resolved = api.post("/v1/jobs/validate", json=SPEC | {"dataset": dataset.id}).json()["spec"]
    other = resolved | {"name": "other", "seed": 7, "schedule": resolved["schedule"] | {"epochs": 50}}
    assert recipe_of(other) == recipe_of(resolved)
    assert recipe_of(resolved | {"resources": resolved["resources"] | {"gpus": 2}}) != recipe_of(resolved)
    assert workload_of(other, {"train": {"images": 10}}) == 500
    detector = resolved["student"]["detector"]
    teacher = {"source": "train", "detector": detector, "schedule": {"epochs": 7}}
    taught = other | {"teacher": teacher}
    assert workload_of(taught, {"train": {"images": 10}}) == 570
    assert recipe_of(taught) != recipe_of(other)
    assert workload_of(other, None) is None


# ---- what jobs ask for, and priority ----


def test_what_a_job_asks_for_is_kept_and_compared(api: TestClient, database: Database, dataset: Dataset):
    body = SPEC | {"dataset": dataset.id} | {"resources": {"gpus": 2, "gpu_memory_gb": 24, "label": "lab"}}
    made = api.post("/v1/jobs", json=body)
    assert made.status_code == 201, made.text
    assert made.json()["queue"]["position"] == 1
    with database.read() as session:
        row = session.get_one(Job, made.json()["id"])
        assert (row.gpus, row.gpu_memory_gb, row.worker_label, row.priority) == (2, 24.0, "lab", 0)
        assert row.recipe
        assert row.workload > 0


@ONE_DATABASE
@pytest.mark.parametrize(
    ("resources", "pointer"),
    [({"gpus": 8}, "/resources/gpus"), ({"gpu_memory_gb": 41}, "/resources/gpu_memory_gb")],
)
def test_more_than_the_operator_allows_is_refused(api: TestClient, app, dataset: Dataset, resources, pointer: str):
    app.state.settings = app.state.settings.model_copy(update={"max_job_gpus": 4, "max_job_gpu_memory_gb": 40.0})
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        answer = api.post(path, json=SPEC | {"dataset": dataset.id} | {"resources": resources})
        assert answer.status_code == 422
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
        assert "no job may ask for more than 4" in answer.json()["detail"]


def test_a_jobs_priority_is_changed(api: TestClient, database: Database, dataset: Dataset, bob: Tenant):
    job = seed.job(database, dataset.tenant_id, dataset.id)
    for _ in range(2):
        answer = api.patch(f"/v1/jobs/{job.id}", json={"priority": 7})
        assert (answer.status_code, answer.json()["priority"]) == (200, 7)
    events = api.get(f"/v1/jobs/{job.id}/events").json()["data"]
    assert [event["message"] for event in events] == ["the priority was changed from 0 to 7"]
    assert api.patch(f"/v1/jobs/{job.id}", json={"priority": 1}, headers=bob.headers).status_code == 404


@ONE_DATABASE
@pytest.mark.parametrize("body", [{"priority": 101}, {"priority": -101}, {"priority": "x"}, {}, {"name": "x"}])
def test_what_is_no_priority_is_refused(api: TestClient, database: Database, dataset: Dataset, body):
    job = seed.job(database, dataset.tenant_id, dataset.id)
    assert api.patch(f"/v1/jobs/{job.id}", json=body).status_code == 422


@ONE_DATABASE
def test_a_key_bounds_the_priority_and_a_job_that_has_ended_has_none(
    api: TestClient, database: Database, dataset: Dataset, alice: Tenant
):
    with database.write() as session:
        session.get_one(ApiKey, alice.key_id).max_priority = 0
    job = seed.job(database, dataset.tenant_id, dataset.id)
    refused = api.patch(f"/v1/jobs/{job.id}", json={"priority": 1})
    assert (refused.status_code, refused.json()["code"]) == (403, "priority_too_high")
    assert api.patch(f"/v1/jobs/{job.id}", json={"priority": -3}).json()["priority"] == -3
    done = seed.job(database, dataset.tenant_id, dataset.id, status="succeeded")
    assert api.patch(f"/v1/jobs/{done.id}", json={"priority": 0}).status_code == 409
