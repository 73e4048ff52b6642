import base64
import hashlib
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.db import Database
from app.http.downloads import safe_name
from app.ids import new_id
from app.models import Artifact, Job
from app.storage import Storage
from tests.app.conftest import ONE_DATABASE, Tenant
from tests.support import rows as seed

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def job(database: Database, alice: Tenant) -> Job:
    return seed.job(database, alice.id, seed.dataset(database, alice.id).id, status="succeeded")


def _artifact(
    database: Database, storage: Storage, job: Job, tmp_path: Path, name: str, *, content: bytes = CONTENT,
    content_type: str = "application/octet-stream",
) -> Artifact:  # fmt: skip
    (tmp_path / "file").write_bytes(content)
    key = f"jobs/{job.id}/artifacts/{new_id('x')}"
    stored = storage.put_file(key, tmp_path / "file")
    row = Artifact(
        id=new_id("art"), job_id=job.id, name=name, kind="student", content_type=content_type, storage_key=key,
        size_bytes=stored.size_bytes, sha256=stored.sha256, details={"ap": 0.5},
    )  # fmt: skip
    return seed.add(database, row)


@pytest.fixture
def path(database: Database, storage: Storage, job: Job, tmp_path: Path) -> str:
    _artifact(database, storage, job, tmp_path, "student-best.safetensors")
    return f"/v1/jobs/{job.id}/artifacts/student-best.safetensors"


def test_artifacts_are_listed_by_name(
    api: TestClient, database: Database, storage: Storage, job: Job, tmp_path: Path, path: str
):
    _artifact(database, storage, job, tmp_path, "gallery/0.jpg", content_type="image/jpeg")
    page = api.get(f"/v1/jobs/{job.id}/artifacts").json()
    assert [item["name"] for item in page["data"]] == ["gallery/0.jpg", "student-best.safetensors"]
    assert (page["has_more"], page["next_cursor"]) == (False, None)
    item = page["data"][1]
    assert item == {
        "name": "student-best.safetensors",
        "kind": "student",
        "content_type": "application/octet-stream",
        "size_bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "details": {"ap": 0.5},
        "created_at": item["created_at"],
        "links": {"content": path},
    }


def test_a_file_is_downloaded_whole(api: TestClient, path: str):
    answer = api.get(path)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    digest = hashlib.sha256(CONTENT)
    headers = answer.headers
    assert headers["etag"] == f'"{digest.hexdigest()}"'
    assert headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert headers["content-length"] == str(len(CONTENT))
    assert headers["accept-ranges"] == "bytes"
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"] == 'attachment; filename="student-best.safetensors"'
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert headers["cache-control"] == "private, no-cache"


def test_head_is_get_without_the_body(api: TestClient, path: str):
    head, whole = api.head(path), api.get(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "repr-digest", "content-type", "content-disposition", "accept-ranges"):
        assert head.headers[name] == whole.headers[name]
    assert api.head(path, headers={"Range": "bytes=0-1"}).status_code == 200


@ONE_DATABASE
@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=10239-", 10239, 10240),
        ("bytes=10-999999999999", 10, 10240),
        ("bytes=-5", 10235, 10240),
        ("bytes=-99999", 0, 10240),
    ],
)
def test_a_range_is_a_part(api: TestClient, path: str, header: str, start: int, end: int):
    answer = api.get(path, headers={"Range": header})
    assert (answer.status_code, answer.content) == (206, CONTENT[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert answer.headers["content-length"] == str(end - start)


@ONE_DATABASE
@pytest.mark.parametrize(
    "header",
    ["", "bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,4-5", "items=0-1", "bytes=a-b", "bytes=1-2x", "bytes=--1", "1-2"],
)
def test_other_ranges_are_answered_whole(api: TestClient, path: str, header: str):
    answer = api.get(path, headers={"Range": header})
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert "content-range" not in answer.headers


@ONE_DATABASE
@pytest.mark.parametrize("header", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
def test_a_range_behind_the_end_cannot_be_satisfied(api: TestClient, path: str, header: str):
    answer = api.get(path, headers={"Range": header})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_a_resumed_download_asks_whether_it_is_still_the_same(api: TestClient, path: str):
    etag = api.head(path).headers["etag"]
    assert api.get(path, headers={"Range": "bytes=5-", "If-Range": etag}).content == CONTENT[5:]
    for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        answer = api.get(path, headers={"Range": "bytes=5-", "If-Range": other})
        assert (answer.status_code, answer.content) == (200, CONTENT)


def test_what_the_caller_has_is_not_sent_again(api: TestClient, path: str):
    etag = api.head(path).headers["etag"]
    for header in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = api.get(path, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert api.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


def test_images_are_shown_and_everything_else_is_saved(
    api: TestClient, database: Database, storage: Storage, job: Job, tmp_path: Path
):
    for name, content_type, kind in (
        ("gallery/0.jpg", "image/jpeg", "inline"),
        ("gallery/1.png", "image/png", "inline"),
        ("gallery/2.svg", "image/svg+xml", "attachment"),
        ("page.html", "text/html", "attachment"),
    ):
        _artifact(database, storage, job, tmp_path, name, content_type=content_type)
        headers = api.get(f"/v1/jobs/{job.id}/artifacts/{name}").headers
        assert headers["content-disposition"] == f'{kind}; filename="{name.rsplit("/")[-1]}"'
        assert headers["x-content-type-options"] == "nosniff"


def test_an_empty_file_is_a_file(api: TestClient, database: Database, storage: Storage, job: Job, tmp_path: Path):
    _artifact(database, storage, job, tmp_path, "log.txt", content=b"", content_type="text/plain")
    path = f"/v1/jobs/{job.id}/artifacts/log.txt"
    assert (api.get(path).status_code, api.get(path).content) == (200, b"")
    assert api.get(path, headers={"Range": "bytes=0-"}).status_code == 416


@pytest.mark.parametrize("name", ["nothing", "%2e%2e/%2e%2e/etc/passwd", "a%00b", "a" * 300, "gallery/"])
def test_there_is_nothing_else(api: TestClient, job: Job, path: str, name: str):
    answer = api.get(f"/v1/jobs/{job.id}/artifacts/{name}")
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


def test_a_lost_object_is_said(api: TestClient, database: Database, storage: Storage, job: Job, tmp_path: Path):
    row = _artifact(database, storage, job, tmp_path, "gone.bin")
    storage.delete(row.storage_key)
    answer = api.get(f"/v1/jobs/{job.id}/artifacts/gone.bin")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert "no longer" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("gallery/0.jpg", "0.jpg"),
        ('a"b\r\nX: y', "a_b__X__y"),
        ("../../etc/passwd", "passwd"),
        (".bashrc", "bashrc"),
        ("zelle-ä.png", "zelle-_.png"),
        ("..", "file"),
        ("", "file"),
    ],
)
def test_file_names_cannot_be_misread(name: str, safe: str):
    assert safe_name(name) == safe
