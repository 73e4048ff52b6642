from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.db import Database
from app.models import Dataset
from app.settings import Settings
from app.storage import Storage
from tests.app.conftest import ONE_DATABASE, RecordingQueue, Tenant
from tests.support import rows as seed

UPLOAD = {"name": "cells", "source": {"kind": "upload"}}
TASK = "worker.tasks.import_dataset"


def _reference(path: object) -> dict:
    return {"name": "cells", "source": {"kind": "reference", "uri": str(path)}}


def test_a_dataset_waits_for_its_upload(api: TestClient, queue: RecordingQueue):
    answer = api.post("/v1/datasets", json=UPLOAD)
    assert answer.status_code == 201
    made = answer.json()
    path = f"/v1/datasets/{made['id']}"
    assert made == {
        "id": made["id"],
        "object": "dataset",
        "name": "cells",
        "status": "awaiting_upload",
        "source": {"kind": "upload"},
        "max_dropped_fraction": 0.05,
        "format": None,
        "classes": None,
        "splits": None,
        "content_hash": None,
        "size_bytes": None,
        "failure": None,
        "created_at": made["created_at"],
        "started_at": None,
        "finished_at": None,
        "links": {"self": path, "content": f"{path}/content", "report": f"{path}/report"},
    }
    assert made["id"].startswith("ds_")
    assert made["created_at"].endswith("Z")
    assert api.get(path).json() == made
    assert queue.sent == []


def test_a_checked_dataset_shows_what_the_worker_found(api: TestClient, database: Database, alice: Tenant):
    report = {
        "format": "voc",
        "images": 14,
        "boxes": 39,
        "masks": 4,
        "classes": [{"name": "car", "splits": {"train": {"images": 2, "boxes": 3}}}],
        "splits": seed.SPLITS,
        "problems": [
            {
                "code": "empty_box",
                "severity": "dropped",
                "count": 1,
                "summary": "Boxes without area.",
                "examples": [{"file": "a.xml", "detail": "width 0"}],
            }
        ],
        "dropped_fraction": 0.02,
        "max_dropped_fraction": 0.05,
    }
    row = seed.dataset(database, alice.id, format="voc", report=report, size_bytes=10_240, content_hash="sha256:00")
    shown = api.get(f"/v1/datasets/{row.id}").json()
    assert (shown["status"], shown["classes"], shown["splits"]) == ("ready", ["car", "person"], seed.SPLITS)
    assert api.get(f"/v1/datasets/{row.id}/report").json() == report


def test_a_report_comes_with_the_check(api: TestClient, database: Database, alice: Tenant):
    row = seed.dataset(database, alice.id, status="queued")
    answer = api.get(f"/v1/datasets/{row.id}/report")
    assert answer.status_code == 404
    assert "it is queued" in answer.json()["detail"]


def test_an_invalid_dataset_says_why(api: TestClient, database: Database, alice: Tenant):
    failure = {"class": "data", "code": "no_classes", "detail": "there are none", "log_tail": ["bye"]}
    row = seed.dataset(database, alice.id, status="invalid", failure=failure)
    assert api.get(f"/v1/datasets/{row.id}").json()["failure"] == failure


def test_other_tenants_see_nothing(api: TestClient, client: TestClient, database: Database, bob: Tenant):
    theirs = seed.dataset(database, bob.id, report={})
    assert api.get("/v1/datasets").json()["data"] == []
    for verb, path in (("GET", ""), ("GET", "/report"), ("PUT", "/content"), ("DELETE", "")):
        answer = api.request(verb, f"/v1/datasets/{theirs.id}{path}", content=b"x" if verb == "PUT" else None)
        assert answer.status_code == 404, (verb, path)
        unknown = api.request(verb, f"/v1/datasets/ds_unknown{path}", content=b"x" if verb == "PUT" else None)
        assert answer.json()["detail"].replace(theirs.id, "ds_unknown") == unknown.json()["detail"]
    with database.read() as session:
        assert session.get(Dataset, theirs.id) is not None


def test_references_inside_the_roots_are_queued_at_once(
    api: TestClient, settings: Settings, queue: RecordingQueue, tmp_path: Path
):
    (tmp_path / "data" / "a b").mkdir()
    (tmp_path / "data" / "set.zip").write_bytes(b"PK")
    for name in ("a b", "set.zip"):
        uri = (tmp_path / "data" / name).as_uri()
        answer = api.post("/v1/datasets", json=_reference(uri))
        assert answer.status_code == 201, answer.text
        made = answer.json()
        assert made["status"] == "queued"
        assert made["source"] == {"kind": "reference", "uri": uri}
        assert queue.sent[-1] == (TASK, made["id"])
        assert api.put(f"/v1/datasets/{made['id']}/content", content=b"x").status_code == 409


def test_references_elsewhere_are_refused(api: TestClient, queue: RecordingQueue, tmp_path: Path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    outside.mkdir()
    (data / "escape").symlink_to(outside)
    (data / "loop").symlink_to(data / "loop")
    (tmp_path / "data-2").mkdir()
    refused = [
        outside.as_uri(),
        "file:///etc/passwd",
        "file:///no/such/place",
        (data / "escape").as_uri(),
        (data / "loop").as_uri(),
        (tmp_path / "data-2").as_uri(),
        f"file://{data}/../outside",
        f"file://{data}/%2e%2e/outside",
        (data / "missing").as_uri(),
        f"file://{data}/%00",
        f"file://elsewhere{data}",
        f"file:{'x' * 1900}",
        f"{data.as_uri()}?x=1",
        str(data),
        "https://example.com/set.zip",
        "",
        "file://[",
    ]
    for uri in refused:
        answer = api.post("/v1/datasets", json=_reference(uri))
        assert (answer.status_code, answer.json()["code"]) == (422, "reference_not_allowed"), uri
        assert answer.json()["errors"][0]["pointer"] == "/source/uri"
    assert queue.sent == []
    # Outside the roots, what exists and what does not get the same answer.
    there, missing = (api.post("/v1/datasets", json=_reference(uri)).json()["detail"] for uri in refused[1:3])
    assert there.replace(refused[1], "") == missing.replace(refused[2], "")
    assert data.as_uri() in there


def test_without_roots_no_references(app, client: TestClient, alice: Tenant):
    app.state.settings = app.state.settings.model_copy(update={"dataset_roots": []})
    answer = client.post("/v1/datasets", json=_reference("file:///etc"), headers=alice.headers)
    assert answer.json()["code"] == "reference_not_allowed"
    assert "DEFEAT_DATASET_ROOTS" in answer.json()["detail"]


def test_pages_follow_each_other(api: TestClient, database: Database, alice: Tenant, bob: Tenant):
    made = [seed.dataset(database, alice.id).id for _ in range(5)]
    seed.dataset(database, bob.id)
    seen: list[str] = []
    cursor = None
    for expected in (2, 2, 1):
        page = api.get("/v1/datasets", params={"limit": 2} | ({"after": cursor} if cursor else {})).json()
        assert len(page["data"]) == expected
        seen += [item["id"] for item in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] is (cursor is not None)
    assert seen == made[::-1]
    assert cursor is None


def test_a_page_that_is_exactly_full_is_the_last(api: TestClient, database: Database, alice: Tenant):
    for _ in range(2):
        seed.dataset(database, alice.id)
    page = api.get("/v1/datasets?limit=2").json()
    assert (len(page["data"]), page["has_more"], page["next_cursor"]) == (2, False, None)


@ONE_DATABASE
@pytest.mark.parametrize(
    "cursor",
    ["x", "é", "bnVsbA", "WyJ4IiwgInkiXQ", "WyIyMDI2LTAxLTAxIiwgIngiXQ", "A" * 300, "e30", "%00", "W1tdLCBbXV0"],
)
def test_cursors_are_ours_or_refused(api: TestClient, cursor: str):
    answer = api.get("/v1/datasets", params={"after": cursor})
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_cursor")


def test_an_unused_dataset_is_deleted_with_its_objects(
    api: TestClient, database: Database, storage: Storage, alice: Tenant, tmp_path: Path
):
    row = seed.dataset(database, alice.id)
    (tmp_path / "x").write_bytes(b"x")
    storage.put_file(f"datasets/{row.id}/dataset.tar", tmp_path / "x")
    storage.put_file("datasets/ds_other/dataset.tar", tmp_path / "x")
    answer = api.delete(f"/v1/datasets/{row.id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert api.get(f"/v1/datasets/{row.id}").status_code == 404
    assert storage.list("datasets") == ["datasets/ds_other/dataset.tar"]


@pytest.mark.parametrize("status", ["queued", "running", "succeeded", "failed", "cancelled"])
def test_a_used_dataset_is_kept(api: TestClient, database: Database, storage: Storage, alice: Tenant, status: str):
    row = seed.dataset(database, alice.id)
    job = seed.job(database, alice.id, row.id, status=status)
    answer = api.delete(f"/v1/datasets/{row.id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "dataset_in_use")
    assert job.id in answer.json()["detail"]
    assert api.get(f"/v1/datasets/{row.id}").status_code == 200


def test_a_dataset_is_not_deleted_under_its_worker(api: TestClient, database: Database, alice: Tenant):
    row = seed.dataset(database, alice.id, status="checking")
    answer = api.delete(f"/v1/datasets/{row.id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
