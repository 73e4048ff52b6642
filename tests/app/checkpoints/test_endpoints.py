import hashlib
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.db import Database
from app.models import Checkpoint
from app.storage import Storage
from tests.app.conftest import Tenant
from tests.support import rows as seed
from tests.support.catalog import TEACHER_DETECTOR


def test_a_checkpoint_waits_for_its_weights_and_its_detector_is_resolved(api: TestClient):
    spec = {"architecture": "faster_rcnn", "backbone": "timm/resnet10t", "pyramid_channels": 64.0}
    body = {"name": "teacher", "detector": spec, "classes": ["person", "car"]}
    answer = api.post("/v1/checkpoints", json=body)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert made["id"].startswith("ckpt_")
    assert (made["object"], made["status"], made["classes"]) == ("checkpoint", "awaiting_upload", ["person", "car"])
    assert made["detector"] == TEACHER_DETECTOR
    assert isinstance(made["detector"]["pyramid_channels"], int)
    assert api.get(made["links"]["self"]).json() == made
    assert api.get("/v1/checkpoints").json()["data"] == [made]


def test_detector_and_classes_may_come_with_the_file(api: TestClient):
    made = api.post("/v1/checkpoints", json={"name": "teacher"}).json()
    assert (made["detector"], made["classes"]) == (None, None)


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({"detector": {}}, [("/detector/architecture", "missing_key")]),
        ({"detector": {"architecture": "yolo"}}, [("/detector/architecture", "unknown_architecture")]),
        ({"detector": {"architecture": []}}, [("/detector/architecture", "unknown_architecture")]),
        (
            {"detector": {"architecture": "faster_rcnn", "backbone": "vgg", "strides": []}},
            [("/detector/backbone", "unknown_backbone"), ("/detector/strides", "out_of_range")],
        ),
        ({"detector": "faster_rcnn"}, [("/detector", "wrong_type")]),
        ({"classes": []}, [("/classes", "out_of_range")]),
        ({"classes": ["a", 1]}, [("/classes/1", "wrong_type")]),
        ({"classes": ["a\0"]}, [("/classes/0", "unfit_value")]),
        ({"classes": "a"}, [("/classes", "wrong_type")]),
    ],
)
def test_mistakes_are_named(api: TestClient, body: dict, errors: list):
    answer = api.post("/v1/checkpoints", json={"name": "teacher"} | body)
    assert answer.status_code == 422
    assert [(item["pointer"], item["code"]) for item in answer.json()["errors"]] == errors


def _stored(database: Database, storage: Storage, tenant: Tenant, tmp_path: Path) -> tuple[Checkpoint, bytes]:
    content = bytes(range(256)) * 20
    (tmp_path / "weights").write_bytes(content)
    row = seed.checkpoint(
        database,
        tenant.id,
        storage_key="checkpoints/x/weights.safetensors",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        coverage={"loaded": 312, "total": 312, "missing": [], "unexpected": []},
    )
    storage.put_file(row.storage_key, tmp_path / "weights")
    return row, content


def test_weights_are_downloaded(api: TestClient, database: Database, storage: Storage, alice: Tenant, tmp_path: Path):
    row, content = _stored(database, storage, alice, tmp_path)
    shown = api.get(f"/v1/checkpoints/{row.id}").json()
    assert shown["coverage"] == {"loaded": 312, "total": 312, "missing": [], "unexpected": []}
    answer = api.get(shown["links"]["content"])
    assert (answer.status_code, answer.content) == (200, content)
    assert answer.headers["etag"] == f'"{row.sha256}"'
    assert answer.headers["content-disposition"] == f'attachment; filename="{row.id}.safetensors"'
    assert api.head(shown["links"]["content"]).headers["content-length"] == str(len(content))
    assert api.get(shown["links"]["content"], headers={"Range": "bytes=1-3"}).content == content[1:4]


@pytest.mark.parametrize("status", ["awaiting_upload", "queued", "checking", "invalid", "failed"])
def test_only_what_is_ready_is_downloaded(api: TestClient, database: Database, alice: Tenant, status: str):
    row = seed.checkpoint(database, alice.id, status=status)
    answer = api.get(f"/v1/checkpoints/{row.id}/content")
    assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_not_ready")
    assert status in answer.json()["detail"]


def test_other_tenants_see_nothing(api: TestClient, database: Database, storage: Storage, bob: Tenant, tmp_path: Path):
    row, _ = _stored(database, storage, bob, tmp_path)
    assert api.get("/v1/checkpoints").json()["data"] == []
    for verb, path in (("GET", ""), ("GET", "/content"), ("HEAD", "/content"), ("DELETE", ""), ("PUT", "/content")):
        assert api.request(verb, f"/v1/checkpoints/{row.id}{path}").status_code == 404, (verb, path)


def test_a_checkpoint_is_deleted_with_its_weights(
    api: TestClient, database: Database, storage: Storage, alice: Tenant, tmp_path: Path
):
    row = seed.checkpoint(database, alice.id)
    (tmp_path / "x").write_bytes(b"x")
    storage.put_file(f"checkpoints/{row.id}/weights.safetensors", tmp_path / "x")
    assert api.delete(f"/v1/checkpoints/{row.id}").status_code == 204
    assert storage.list("checkpoints") == []


@pytest.mark.parametrize("place", ["teacher", "teacher_initial", "student_initial"])
def test_a_checkpoint_is_kept_while_a_job_may_read_it(
    api: TestClient, database: Database, alice: Tenant, bob: Tenant, place: str
):
    row = seed.checkpoint(database, alice.id)
    teacher = {"teacher": {"source": "checkpoint", "id": row.id}, "teacher_initial": {"initial_weights": row.id}}.get(
        place
    )
    student = {"initial_weights": row.id if place == "student_initial" else "random"}
    data = seed.dataset(database, alice.id)
    job = seed.job(database, alice.id, data.id, status="running", spec={"teacher": teacher, "student": student})
    second = seed.job(database, alice.id, data.id, status="queued", spec=job.spec)
    seed.job(database, bob.id, seed.dataset(database, bob.id).id, status="running", spec=job.spec)
    answer = api.delete(f"/v1/checkpoints/{row.id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_in_use")
    assert job.id in answer.json()["detail"]
    assert second.id in answer.json()["detail"]
    with database.write() as session:
        session.get_one(type(job), job.id).status = "succeeded"
        session.get_one(type(job), second.id).status = "cancelled"
    assert api.delete(f"/v1/checkpoints/{row.id}").status_code == 204
