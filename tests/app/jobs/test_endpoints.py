from typing import Any

import pytest
from starlette.testclient import TestClient

from app.db import Database, utcnow
from app.models import Dataset, Job, JobEvaluation, JobEvent, JobMetric
from tests.app.conftest import RecordingQueue, Tenant
from tests.support import rows as seed
from tests.support.racing import race

SPEC = {
    "name": "cells-small",
    "teacher": None,
    "student": {"detector": {"architecture": "faster_rcnn", "backbone": "timm/resnet10t"}},
    "distillation": {"method": "baseline"},
}


@pytest.fixture
def dataset(database: Database, alice: Tenant) -> Dataset:
    return seed.dataset(database, alice.id)


def _read(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def _add_all(database: Database, rows: list[Any]) -> None:
    with database.write() as session:
        session.add_all(rows)


def test_a_job_is_made_queued_and_announced(
    api: TestClient, database: Database, queue: RecordingQueue, dataset: Dataset
):
    body = SPEC | {"dataset": dataset.id, "labels": {"team": "lab"}}
    answer = api.post("/v1/jobs", json=body)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    path = f"/v1/jobs/{made['id']}"
    resolved = api.post("/v1/jobs/validate", json=body).json()["spec"]
    assert made == {
        "id": made["id"],
        "object": "job",
        "name": "cells-small",
        "labels": {"team": "lab"},
        "status": "queued",
        "attempt": 0,
        "dataset_id": dataset.id,
        "spec": resolved,
        "priority": 0,
        "queue": {
            "position": 1,
            "jobs_ahead": 0,
            "waiting_for": "a worker; none is running for queue `jobs`",
            "eta_s": None,
            "eta_low_s": None,
            "eta_high_s": None,
        },
        "adjustments": None,
        "not_before": None,
        "progress": None,
        "results": None,
        "failure": None,
        "created_at": made["created_at"],
        "started_at": None,
        "finished_at": None,
        "links": {"self": path}
        | {
            name: f"{path}/{name}"
            for name in ("events", "metrics", "evaluations", "artifacts", "pause", "resume", "cancel", "retry")
        },
    }
    assert made["id"].startswith("job_")
    assert api.get(path).json() == made
    assert queue.sent == [("worker.tasks.run_job", made["id"])]
    assert _read(database, made["id"]).enqueued_at is not None
    events = api.get(f"{path}/events").json()["data"]
    assert [(event["level"], event["code"]) for event in events] == [("info", "created")]


def test_a_refused_job_leaves_nothing(api: TestClient, database: Database, queue: RecordingQueue, dataset: Dataset):
    assert api.post("/v1/jobs", json=SPEC | {"dataset": dataset.id, "seed": -1}).status_code == 422
    assert api.get("/v1/jobs").json()["data"] == []
    assert queue.sent == []


def test_a_broker_that_is_away_costs_no_job(
    api: TestClient, database: Database, queue: RecordingQueue, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    def _away(*_args: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(queue, "send", _away)
    answer = api.post("/v1/jobs", json=SPEC | {"dataset": dataset.id})
    assert answer.status_code == 201
    row = _read(database, answer.json()["id"])
    assert (row.status, row.enqueued_at) == ("queued", None)  # so the next sweep sends it


def test_what_a_worker_wrote_is_shown(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    progress = {"phase": "distillation", "epoch": 2, "epochs": 12, "step": 5, "steps": 60, "fraction": 0.1,
                "eta_s": 60.5, "images_per_s": 20.0}  # fmt: skip
    metrics = {"ap": 0.5, "ap50": 0.8, "ap_small": None, "per_class": [{"class": "car", "ap": 0.5, "ap50": 0.8}]}
    job = seed.job(
        database, alice.id, dataset.id, status="running", attempt=2, progress=progress, started_at=utcnow(),
        results={"teacher": None, "student": metrics | {"epoch": 2}, "teacher_checkpoint_id": None},
        failure={"class": "oom", "code": "out_of_memory", "detail": "too much", "log_tail": ["a", "b"]},
    )  # fmt: skip
    shown = api.get(f"/v1/jobs/{job.id}").json()
    assert (shown["progress"], shown["attempt"]) == (progress, 2)
    assert shown["results"]["student"] == metrics | {"epoch": 2}
    assert shown["failure"] == {"class": "oom", "code": "out_of_memory", "detail": "too much", "log_tail": ["a", "b"]}
    assert shown["started_at"].endswith("Z")


def test_lists_are_filtered(api: TestClient, database: Database, alice: Tenant, bob: Tenant, dataset: Dataset):
    other = seed.dataset(database, alice.id)
    a = seed.job(database, alice.id, dataset.id, name="Cells 100%_big", status="running").id
    b = seed.job(database, alice.id, other.id, name="cells small").id
    c = seed.job(database, alice.id, other.id, name="digits", status="running").id
    seed.job(database, bob.id, seed.dataset(database, bob.id).id, name="cells of bob", status="running")

    def _ids(**query: str) -> list[str]:
        return [job["id"] for job in api.get("/v1/jobs", params=query).json()["data"]]

    assert _ids() == [c, b, a]
    assert _ids(status="running") == [c, a]
    assert _ids(dataset=other.id) == [c, b]
    assert _ids(name="cells") == [b, a]
    assert _ids(name="0%_") == [a]
    assert _ids(name="%") == [a]
    assert _ids(name="nothing") == []
    assert _ids(status="running", dataset=other.id, name="dig") == [c]


def test_rows_of_one_moment_are_paged_without_loss(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset
):
    moment = utcnow()
    ids = [seed.job(database, alice.id, dataset.id, created_at=moment).id for _ in range(7)]
    seen, query = [], {"limit": "3"}
    while True:
        page = api.get("/v1/jobs", params=query).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next_cursor"]
    assert sorted(seen) == sorted(ids)
    assert len(seen) == 7


def test_rows_made_while_paging_do_not_shift_pages(
    api: TestClient, database: Database, alice: Tenant, dataset: Dataset
):
    ids = [seed.job(database, alice.id, dataset.id).id for _ in range(4)]
    first = api.get("/v1/jobs?limit=2").json()
    seed.job(database, alice.id, dataset.id)
    second = api.get("/v1/jobs", params={"limit": 2, "after": first["next_cursor"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]


def test_events_come_oldest_first_and_go_on(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    job = seed.job(database, alice.id, dataset.id)
    _add_all(database, [JobEvent(job_id=job.id, level="info", code=f"e{n}", message="<b>hi</b>") for n in range(5)])
    first = api.get(f"/v1/jobs/{job.id}/events?limit=2").json()
    assert [event["code"] for event in first["data"]] == ["e0", "e1"]
    assert (first["has_more"], first["next_cursor"]) == (True, first["data"][-1]["id"])
    assert first["data"][0]["id"].startswith("evt_")
    rest = api.get(f"/v1/jobs/{job.id}/events", params={"after": first["next_cursor"]}).json()
    assert [event["code"] for event in rest["data"]] == ["e2", "e3", "e4"]
    assert (rest["has_more"], rest["next_cursor"]) == (False, None)
    for cursor in ("evt_", "evt_x", "5", "evt_99999999999999999999"):
        assert api.get(f"/v1/jobs/{job.id}/events", params={"after": cursor}).json()["code"] == "bad_cursor"


def test_metrics_come_by_step_and_subject(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    job = seed.job(database, alice.id, dataset.id)
    rows = [
        JobMetric(job_id=job.id, subject=subject, step=step, epoch=step / 10, values={"loss/total": 1.5, "x": None})
        for step in (30, 10, 20)
        for subject in ("student", "teacher")
    ]
    _add_all(database, rows)
    path = f"/v1/jobs/{job.id}/metrics"
    page = api.get(path, params={"limit": 2}).json()
    assert [row["step"] for row in page["data"]] == [10, 20]
    assert page["data"][0] == {"subject": "student", "step": 10, "epoch": 1.0, "values": {"loss/total": 1.5, "x": None}}
    assert page["has_more"] is True
    rest = api.get(path, params={"after_step": 20}).json()
    assert ([row["step"] for row in rest["data"]], rest["has_more"]) == ([30], False)
    assert {row["subject"] for row in api.get(path, params={"subject": "teacher"}).json()["data"]} == {"teacher"}
    for query in ({"subject": "both"}, {"after_step": "-2"}, {"after_step": 2**31}, {"limit": 0}, {"limit": 10_001}):
        assert api.get(path, params=query).status_code == 422, query


def test_evaluations_come_by_epoch(api: TestClient, database: Database, alice: Tenant, dataset: Dataset):
    job = seed.job(database, alice.id, dataset.id)
    _add_all(
        database,
        [JobEvaluation(job_id=job.id, subject=s, epoch=e, metrics={"ap": e / 10}) for e, s in
         [(2, "student"), (1, "student"), (2, "teacher")]],
    )  # fmt: skip
    data = api.get(f"/v1/jobs/{job.id}/evaluations").json()["data"]
    assert [(row["epoch"], row["subject"], row["metrics"]["ap"]) for row in data] == [
        (1, "student", 0.1),
        (2, "student", 0.2),
        (2, "teacher", 0.2),
    ]


def test_other_tenants_see_nothing(api: TestClient, database: Database, bob: Tenant):
    theirs = seed.job(database, bob.id, seed.dataset(database, bob.id).id)
    assert api.get("/v1/jobs").json()["data"] == []
    for verb, path in (
        ("GET", ""), ("GET", "/events"), ("GET", "/metrics"), ("GET", "/evaluations"), ("GET", "/artifacts"),
        ("GET", "/artifacts/log.txt"), ("HEAD", "/artifacts/log.txt"), ("POST", "/cancel"),
        ("POST", "/pause"), ("POST", "/resume"), ("POST", "/retry"),
    ):  # fmt: skip
        assert api.request(verb, f"/v1/jobs/{theirs.id}{path}").status_code == 404, (verb, path)
    assert _read(database, theirs.id).status == "queued"


def test_a_job_and_the_deletion_of_its_dataset_exclude_each_other(api: TestClient, database: Database, alice: Tenant):
    for _ in range(5):
        row = seed.dataset(database, alice.id)
        answers: dict[int, int] = {}

        def _do(number: int, dataset_id: str = row.id, answers: dict[int, int] = answers) -> None:
            if number:
                answers[1] = api.delete(f"/v1/datasets/{dataset_id}").status_code
            else:
                answers[0] = api.post("/v1/jobs", json=SPEC | {"dataset": dataset_id}).status_code

        race(_do, 2)
        assert (answers[0], answers[1]) in {(201, 409), (422, 204)}
