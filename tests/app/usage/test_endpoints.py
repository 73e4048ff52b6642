import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app.db import Database
from app.ids import new_id
from app.models import Artifact
from app.models import Tenant as TenantRow
from app.settings import Settings
from app.storage import Storage
from tests.app.conftest import RecordingQueue, Tenant
from tests.app.jobs.test_endpoints import SPEC
from tests.support import rows as seed
from tests.support.racing import race

UPLOAD = {"name": "cells", "source": {"kind": "upload"}}
WEIGHTS = {"name": "teacher", "detector": None, "classes": None}


@pytest.fixture
def quota(app: FastAPI, api: TestClient, settings: Settings) -> Callable[..., None]:
    """Set the service's quotas."""

    def _set(**limits: int) -> None:
        app.state.settings = settings.model_copy(update={f"quota_{name}": limit for name, limit in limits.items()})

    return _set


def _limits(database: Database, tenant: Tenant, limits: dict[str, int | None] | None) -> None:
    with database.write() as session:
        session.get_one(TenantRow, tenant.id).limits = limits


def test_usage_counts_what_a_tenant_has(api: TestClient, database: Database, alice: Tenant, bob: Tenant):
    for tenant in (alice, bob):
        data = seed.dataset(database, tenant.id, size_bytes=1000)
        seed.dataset(database, tenant.id, status="awaiting_upload")
        seed.dataset(database, tenant.id, status="failed", upload_key="datasets/x/upload-1", upload_bytes=30)
        seed.dataset(database, tenant.id, status="invalid", upload_bytes=7)  # its upload is gone
        seed.checkpoint(database, tenant.id, size_bytes=200)
        seed.checkpoint(database, tenant.id, status="queued", upload_key="checkpoints/x/upload-1", upload_bytes=5)
        job = seed.job(database, tenant.id, data.id, status="succeeded")
        seed.job(database, tenant.id, data.id)
        for name, size in (("a", 10), ("b", 20)):
            artifact = Artifact(
                id=new_id("art"),
                job_id=job.id,
                name=name,
                kind="log",
                content_type="text/plain",
                storage_key=f"jobs/{job.id}/artifacts/1/{name}",
                size_bytes=size,
                sha256="0" * 64,
                details={},
            )
            seed.add(database, artifact)
    _limits(database, alice, {"datasets": 9})
    assert api.get("/v1/usage").json() == {
        "object": "usage",
        "storage": {
            "uploads_bytes": 35,
            "datasets_bytes": 1000,
            "checkpoints_bytes": 200,
            "artifacts_bytes": 30,
            "total_bytes": 1265,
        },
        "quotas": {
            "queued_jobs": {"used": 1, "limit": None},
            "uploads": {"used": 1, "limit": None},
            "datasets": {"used": 4, "limit": 9},
            "storage_bytes": {"used": 1265, "limit": None},
        },
    }


def test_jobs_beyond_the_quota_wait_outside(api: TestClient, database: Database, alice: Tenant, quota):
    body = SPEC | {"dataset": seed.dataset(database, alice.id).id}
    quota(queued_jobs=2)
    made = [api.post("/v1/jobs", json=body, headers={"Idempotency-Key": str(number)}) for number in range(3)]
    assert [answer.status_code for answer in made] == [201, 201, 429]
    refused = made[2]
    assert refused.json()["code"] == "quota_busy"
    assert "quota queued_jobs is 2 queued jobs; there are 2: " in refused.json()["detail"]
    assert refused.headers["Retry-After"] == "60"
    # A repeated request makes nothing, so it is answered all the same; and a mistake is told before the quota.
    assert api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "0"}).json()["id"] == made[0].json()["id"]
    assert api.post("/v1/jobs", json=body | {"seed": -1}).status_code == 422
    api.post(f"/v1/jobs/{made[0].json()['id']}/cancel")
    assert api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "2"}).status_code == 201


@pytest.mark.parametrize(("verb", "status"), [("resume", "paused"), ("retry", "failed"), ("retry", "cancelled")])
def test_jobs_that_are_queued_again_count_as_new_ones_do(
    api: TestClient, database: Database, storage: Storage, alice: Tenant, queue: RecordingQueue, quota, verb, status,
    tmp_path: Path,
):  # fmt: skip
    dataset = seed.dataset(database, alice.id)
    (tmp_path / "checkpoint").write_bytes(b"state")
    key = storage.put_file("jobs/x/resume/1-1.pt", tmp_path / "checkpoint").key
    waiting = seed.job(database, alice.id, dataset.id)
    job = seed.job(database, alice.id, dataset.id, status=status, resume_key=key)
    path, body = f"/v1/jobs/{job.id}", {"from": "beginning"} if verb == "retry" else None
    quota(queued_jobs=1)

    refused = api.post(f"{path}/{verb}", json=body)

    assert (refused.status_code, refused.json()["code"]) == (429, "quota_busy")
    assert "quota queued_jobs is 1 queued jobs; there are 1: " in refused.json()["detail"]
    assert refused.headers["Retry-After"] == "60"
    assert api.get(path).json()["status"] == status
    assert api.get(f"{path}/events").json()["data"] == []
    assert (queue.sent, storage.list("jobs/x")) == ([], [key])
    # One that waits already needs no more room, and what its state forbids is told before the quota.
    assert api.post(f"/v1/jobs/{waiting.id}/resume").status_code == 202
    assert api.post(f"/v1/jobs/{waiting.id}/retry").status_code == 409
    api.post(f"/v1/jobs/{waiting.id}/cancel")
    assert api.post(f"{path}/{verb}", json=body).json()["status"] == "queued"
    assert queue.sent == [("worker.tasks.run_job", job.id)]


def test_racing_resumes_do_not_pass_the_quota_together(api: TestClient, database: Database, alice: Tenant, quota):
    dataset = seed.dataset(database, alice.id)
    jobs = [seed.job(database, alice.id, dataset.id, status="paused") for _ in range(6)]
    quota(queued_jobs=2)
    answers: dict[int, int] = {}

    def _resume(number: int) -> None:
        answers[number] = api.post(f"/v1/jobs/{jobs[number].id}/resume").status_code

    race(_resume, 6)
    assert sorted(answers.values()) == [202] * 2 + [429] * 4
    assert api.get("/v1/usage").json()["quotas"]["queued_jobs"] == {"used": 2, "limit": 2}


def test_a_tenants_own_limit_goes_before_the_services(
    api: TestClient, database: Database, alice: Tenant, bob: Tenant, quota
):
    quota(datasets=1)
    _limits(database, alice, {"datasets": 2})
    _limits(database, bob, {"datasets": None})
    answers = [api.post("/v1/datasets", json=UPLOAD) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 201, 403]
    assert answers[2].json()["code"] == "quota_exceeded"
    assert "datasets is 2 datasets; there are 2: delete one" in answers[2].json()["detail"]
    assert [api.post("/v1/datasets", json=UPLOAD, headers=bob.headers).status_code for _ in range(3)] == [201] * 3


def test_few_assets_may_wait_for_their_content(api: TestClient, quota):
    quota(uploads=2)
    dataset = api.post("/v1/datasets", json=UPLOAD)
    assert dataset.status_code == 201
    assert api.post("/v1/checkpoints", json=WEIGHTS).status_code == 201
    for path, body in (("/v1/datasets", UPLOAD), ("/v1/checkpoints", WEIGHTS)):
        answer = api.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_busy")
    assert api.put(f"/v1/datasets/{dataset.json()['id']}/content", content=b"x").status_code == 202
    assert api.post("/v1/checkpoints", json=WEIGHTS).status_code == 201


def test_an_upload_beyond_the_storage_quota_is_refused(
    api: TestClient, database: Database, storage: Storage, alice: Tenant, quota
):
    quota(storage_bytes=100)
    full = seed.dataset(database, alice.id, size_bytes=60)
    row = seed.dataset(database, alice.id, status="awaiting_upload")
    path = f"/v1/datasets/{row.id}/content"

    def _chunks(size: int) -> Iterator[bytes]:
        yield b"x" * size

    for content in (b"x" * 41, _chunks(41)):
        answer = api.put(path, content=content)
        assert (answer.status_code, answer.json()["code"]) == (403, "quota_exceeded")
        assert "is 100 stored bytes; there are 60, and this request adds 41" in answer.json()["detail"]
    assert storage.list("datasets") == []
    assert api.get("/v1/usage").json()["quotas"]["uploads"]["used"] == 1
    assert api.put(path, content=_chunks(40)).status_code == 202
    assert api.get("/v1/usage").json()["storage"]["uploads_bytes"] == 40
    answer = api.post("/v1/jobs", json=SPEC | {"dataset": full.id})
    assert (answer.status_code, answer.json()["code"]) == (403, "quota_exceeded")


def test_racing_requests_do_not_pass_a_limit_together(api: TestClient, database: Database, alice: Tenant, quota):
    quota(datasets=5)
    answers: dict[int, int] = {}

    def _post(number: int) -> None:
        answers[number] = api.post("/v1/datasets", json=UPLOAD).status_code

    race(_post, 12)
    assert sorted(answers.values()) == [201] * 5 + [403] * 7
    assert api.get("/v1/usage").json()["quotas"]["datasets"] == {"used": 5, "limit": 5}


def test_the_operator_sets_limits_by_command(database: Database, alice: Tenant, bob: Tenant, admin):
    name = "alice's lab"
    code, out, _ = admin("usage", "--tenant", name, "--set", "queued_jobs=3", "--set", "datasets=none")
    assert code == 0
    assert json.loads(out)["quotas"]["queued_jobs"] == {"used": 0, "limit": 3}
    with database.read() as session:
        assert session.get_one(TenantRow, alice.id).limits == {"queued_jobs": 3, "datasets": None}
    assert admin("usage", "--tenant", name, "--clear", "queued_jobs", "--clear", "datasets")[0] == 0
    code, out, _ = admin("usage")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["tenant"] for line in lines] == [name, "bob's lab"]
    assert lines[0]["quotas"] == lines[1]["quotas"]
    for arguments, error in (
        (["--tenant", "nobody", "--set", "datasets=1"], "no tenant 'nobody'"),
        (["--tenant", "nobody"], "no tenant 'nobody'"),
        (["--tenant", name, "--set", "cats=1"], "no quota 'cats'; the quotas are queued_jobs, uploads,"),
    ):
        code, _, printed = admin("usage", *arguments)
        assert code == 1
        assert error in printed
    for arguments in (["--set", "datasets=1"], ["--tenant", name, "--set", "datasets=-1"]):
        assert admin("usage", *arguments)[0] == 2


def test_a_full_quota_hides_nothing_of_other_tenants(api: TestClient, bob: Tenant, quota, tmp_path: Path):
    quota(datasets=0)
    assert api.post("/v1/datasets", json=UPLOAD).status_code == 403
    assert api.get("/v1/usage", headers=bob.headers).json()["quotas"]["datasets"]["used"] == 0
    assert api.get("/v1/usage", headers={"Authorization": "Bearer dk_no"}).status_code == 401
