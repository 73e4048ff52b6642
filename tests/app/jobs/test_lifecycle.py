"""Pause, resume, cancel and retry, as a job's owner asks for them."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.db import Database, utcnow
from app.models import Dataset, Job, JobEvaluation, JobMetric
from app.queue.leases import claim, find_lost
from app.states import JOB_MOVES
from app.storage import Storage
from tests.app.conftest import RecordingQueue, Tenant
from tests.support import rows as seed
from tests.support.racing import race

FAILURE = {"class": "infra", "code": "run_died", "detail": "it died", "log_tail": []}


@pytest.fixture
def dataset(database: Database, alice: Tenant) -> Dataset:
    return seed.dataset(database, alice.id)


def _read(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def _held(status: str) -> dict[str, Any]:
    if status not in Job.HELD:
        return {}
    return {"lease_owner": "w", "lease_expires_at": utcnow() + timedelta(seconds=30), "attempt": 1}


def _events(api: TestClient, job_id: str) -> list[str]:
    return [event["code"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["data"]]


def test_a_queued_job_is_cancelled_at_once(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    job = seed.job(database, alice.id, dataset.id)
    answer = api.post(f"/v1/jobs/{job.id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert answer.json()["finished_at"] is not None
    assert api.get(f"/v1/jobs/{job.id}/events").json()["data"][-1]["code"] == "cancelled"


@pytest.mark.parametrize("status", ["preparing", "running"])
def test_a_held_job_is_asked_to_end(api: TestClient, database: Database, alice: Tenant, dataset: Dataset, status: str):
    lease = {"lease_owner": "w", "lease_expires_at": utcnow() + timedelta(seconds=30), "attempt": 1}
    job = seed.job(database, alice.id, dataset.id, status=status, **lease)
    for _ in range(2):  # asking again changes nothing
        answer = api.post(f"/v1/jobs/{job.id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")
    row = _read(database, job.id)
    assert (row.lease_owner, row.attempt, row.finished_at) == ("w", 1, None)
    assert [event["code"] for event in api.get(f"/v1/jobs/{job.id}/events").json()["data"]] == ["cancelling"]


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_what_has_ended_cannot_be_cancelled(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset, status: str
):
    job = seed.job(database, alice.id, dataset.id, status=status)
    answer = api.post(f"/v1/jobs/{job.id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert _read(database, job.id).status == status


def test_cancelling_from_many_sides_is_one_cancel(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    job = seed.job(database, alice.id, dataset.id)
    statuses: list[int] = []
    race(lambda _number: statuses.append(api.post(f"/v1/jobs/{job.id}/cancel").status_code), 4)
    assert sorted(statuses) == [202, 409, 409, 409]
    assert len(api.get(f"/v1/jobs/{job.id}/events").json()["data"]) == 1


# What each request makes of each state: the state after it, or None for a 409 that changes nothing.
TABLE = {
    "pause": {
        "queued": "paused",
        "preparing": "pausing",
        "running": "pausing",
        "pausing": "pausing",
        "paused": "paused",
    },
    "resume": {"queued": "queued", "preparing": "preparing", "running": "running", "paused": "queued"},
    "cancel": {
        "queued": "cancelled",
        "preparing": "cancelling",
        "running": "cancelling",
        "pausing": "cancelling",
        "paused": "cancelled",
        "cancelling": "cancelling",
    },
    "retry": {"failed": "queued", "cancelled": "queued"},
}


@pytest.mark.parametrize("status", JOB_MOVES)
@pytest.mark.parametrize("verb", TABLE)
def test_each_request_in_each_state(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset, verb: str, status: str
):
    job = seed.job(database, alice.id, dataset.id, status=status, **_held(status))
    after = TABLE[verb].get(status)
    answer = api.post(f"/v1/jobs/{job.id}/{verb}")
    if after is None:
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert f"{job.id} is {status}" in answer.json()["detail"]
        assert _events(api, job.id) == []
    else:
        assert (answer.status_code, answer.json()["status"]) == (202, after), answer.text
        assert len(_events(api, job.id)) == (after != status)
    assert _read(database, job.id).status == (after or status)


@pytest.mark.parametrize("status", ["queued", "running"])
def test_pausing_twice_is_pausing_once(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset, status: str
):
    job = seed.job(database, alice.id, dataset.id, status=status, **_held(status))
    answers = [api.post(f"/v1/jobs/{job.id}/pause").json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(_events(api, job.id)) == 1


def test_a_paused_job_is_claimed_and_found_by_nobody(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset, queue: RecordingQueue
):
    job = seed.job(database, alice.id, dataset.id)
    api.post(f"/v1/jobs/{job.id}/pause")
    with database.write() as session:
        assert claim(session, Job, job.id, owner="w", lease_s=30) is None
        assert find_lost(session, redeliver_s=0.001, max_attempts=5) == []
    assert queue.sent == []
    resumed = api.post(f"/v1/jobs/{job.id}/resume").json()
    assert (resumed["status"], resumed["attempt"]) == ("queued", 0)
    assert queue.sent == [("worker.tasks.run_job", job.id)]
    api.post(f"/v1/jobs/{job.id}/resume")
    assert len(queue.sent) == 1
    assert _events(api, job.id) == ["paused", "unpaused"]
    with database.write() as session:
        assert claim(session, Job, job.id, owner="w", lease_s=30) is not None


def test_a_job_whose_worker_is_lost_while_it_pauses_is_paused(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset
):
    lease = {"lease_owner": "w", "lease_expires_at": utcnow() - timedelta(seconds=1), "attempt": 1}
    job = seed.job(database, alice.id, dataset.id, status="pausing", resume_key="jobs/x/resume/1-1.pt", **lease)
    with database.write() as session:
        assert claim(session, Job, job.id, owner="w", lease_s=30) is None
        # Although it was the last attempt that it had: its owner has asked for a pause.
        assert find_lost(session, redeliver_s=120, max_attempts=1) == []
    row = _read(database, job.id)
    assert (row.status, row.lease_owner, row.resume_key) == ("paused", None, "jobs/x/resume/1-1.pt")
    assert _events(api, job.id) == ["paused"]


def _ended(database: Database, alice: Tenant, dataset: Dataset, **values: Any) -> Job:
    defaults = {
        "status": "failed",
        "attempt": 3,
        "failed_attempts": 2,
        "failure": FAILURE,
        "adjustments": {"schedule": {"accumulation": 2}},
        "progress": {"phase": "distillation", "fraction": 0.5, "eta_s": 9.0, "images_per_s": 3.0},
        "started_at": utcnow(),
        "finished_at": utcnow(),
    }
    job = seed.job(database, alice.id, dataset.id, **defaults | values)
    with database.write() as session:
        session.add(JobMetric(job_id=job.id, subject="student", step=10, epoch=1.0, values={"loss/total": 1.0}))
        session.add(JobEvaluation(job_id=job.id, subject="student", epoch=1, metrics={"ap": 0.1}))
    return job


def _measured(api: TestClient, job: Job) -> tuple[int, int]:
    found = (api.get(f"/v1/jobs/{job.id}/{what}").json()["data"] for what in ("metrics", "evaluations"))
    metrics, evaluations = (len(rows) for rows in found)
    return metrics, evaluations


@pytest.mark.parametrize("body", [None, {}, {"from": None}, {"from": "checkpoint"}])
@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retrying_from_the_last_checkpoint(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset, queue: RecordingQueue, body: Any, status: str
):
    job = _ended(database, alice, dataset, status=status, resume_key="jobs/x/resume/3-1.pt")
    answer = api.post(f"/v1/jobs/{job.id}/retry", json=body)
    assert answer.status_code == 202, answer.text
    shown = answer.json()
    assert {name: shown[name] for name in ("status", "failure", "results", "started_at", "finished_at")} == {
        "status": "queued", "failure": None, "results": None, "started_at": None, "finished_at": None,
    }  # fmt: skip
    assert (shown["adjustments"], shown["progress"]["fraction"]) == ({"schedule": {"accumulation": 2}}, 0.5)
    assert (shown["progress"]["eta_s"], shown["progress"]["images_per_s"]) == (None, None)
    row = _read(database, job.id)
    assert (row.resume_key, row.failed_attempts, row.attempt) == ("jobs/x/resume/3-1.pt", 0, 3)
    assert _measured(api, job) == (1, 1)
    assert queue.sent == [("worker.tasks.run_job", job.id)]
    assert _events(api, job.id) == ["retried"]
    again = api.post(f"/v1/jobs/{job.id}/retry", json=body)
    assert (again.status_code, again.json()["code"]) == (409, "conflict")


def test_retrying_from_the_beginning_forgets_what_was_logged(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset, storage: Storage, tmp_path: Path
):
    (tmp_path / "checkpoint").write_bytes(b"state")
    key = storage.put_file("jobs/x/resume/3-1.pt", tmp_path / "checkpoint").key
    job = _ended(database, alice, dataset, resume_key=key)
    shown = api.post(f"/v1/jobs/{job.id}/retry", json={"from": "beginning"}).json()
    assert (shown["status"], shown["progress"], shown["adjustments"]) == ("queued", None, None)
    assert _read(database, job.id).resume_key is None
    assert _measured(api, job) == (0, 0)
    assert storage.list("jobs/x") == []


def test_retrying_without_a_checkpoint(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    job = _ended(database, alice, dataset)
    answer = api.post(f"/v1/jobs/{job.id}/retry", json={"from": "checkpoint"})
    assert (answer.status_code, answer.json()["code"]) == (409, "no_checkpoint")
    assert "beginning" in answer.json()["detail"]
    assert api.post(f"/v1/jobs/{job.id}/retry").json()["status"] == "queued"
    assert _measured(api, job) == (0, 0)


def test_a_wrong_place_to_begin(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    job = _ended(database, alice, dataset)
    answer = api.post(f"/v1/jobs/{job.id}/retry", json={"from": "epoch 3"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/from"
    assert api.post(f"/v1/jobs/{job.id}/retry", json={"start": "beginning"}).status_code == 422


def test_a_repeated_retry_is_replayed(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset, queue: RecordingQueue
):
    job = _ended(database, alice, dataset)
    headers = {"Idempotency-Key": "once"}
    first, second = (api.post(f"/v1/jobs/{job.id}/retry", headers=headers) for _ in range(2))
    assert (second.status_code, second.json()) == (202, first.json())
    assert second.headers["Idempotent-Replayed"] == "true"
    assert len(queue.sent) == 1
    other = api.post(f"/v1/jobs/{job.id}/retry", headers=headers, json={"from": "beginning"})
    assert other.json()["code"] == "idempotency_key_reused"


def test_a_job_whose_checkpoint_was_deleted_is_not_tried_again(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset
):
    checkpoint = seed.checkpoint(database, alice.id)
    spec = {"teacher": {"source": "checkpoint", "id": checkpoint.id}, "student": {"initial_weights": "random"}}
    job = _ended(database, alice, dataset, spec=spec)
    assert api.delete(f"/v1/checkpoints/{checkpoint.id}").status_code == 204
    answer = api.post(f"/v1/jobs/{job.id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_not_found")
    assert checkpoint.id in answer.json()["detail"]


def test_a_paused_job_keeps_its_checkpoint_from_deletion(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset
):
    checkpoint = seed.checkpoint(database, alice.id)
    spec = {"teacher": {"source": "checkpoint", "id": checkpoint.id}, "student": {}}
    seed.job(database, alice.id, dataset.id, status="paused", spec=spec)
    assert api.delete(f"/v1/checkpoints/{checkpoint.id}").status_code == 409


def test_pausing_and_cancelling_at_once_ends_cancelled(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset
):
    job = seed.job(database, alice.id, dataset.id, status="running", **_held("running"))
    race(lambda number: api.post(f"/v1/jobs/{job.id}/{('pause', 'cancel')[number % 2]}"), 4)
    assert _read(database, job.id).status == "cancelling"
