import asyncio
import base64
import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app.db import Database
from app.http import uploads
from app.models import Dataset
from app.settings import MIB, Settings
from app.storage import Storage
from tests.app.conftest import RecordingQueue, Tenant
from tests.support import rows as seed
from tests.support.racing import race

BODY = bytes(range(256)) * 8192  # 2 MiB: several buffers


def _digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


@pytest.fixture
def row(database: Database, alice: Tenant) -> Dataset:
    return seed.dataset(database, alice.id, status="awaiting_upload", classes=None, splits=None)


@pytest.fixture
def path(row: Dataset) -> str:
    return f"/v1/datasets/{row.id}/content"


def _state(database: Database, row: Dataset) -> tuple[str, str | None]:
    with database.read() as session:
        fresh = session.get_one(Dataset, row.id)
    return fresh.status, fresh.upload_key


def _stored(storage: Storage, key: str) -> bytes:
    return b"".join(storage.stream(key))


def _parts(settings: Settings) -> list[Path]:
    return list((settings.scratch / "uploads").glob("*"))


@pytest.mark.parametrize("kind", ["datasets", "checkpoints"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_reaches_the_store_and_the_queue(
    api: TestClient, database: Database, storage: Storage, settings: Settings, queue: RecordingQueue, alice: Tenant,
    kind: str, chunked: bool,
):  # fmt: skip
    make = seed.dataset if kind == "datasets" else seed.checkpoint
    row = make(database, alice.id, status="awaiting_upload")
    content = iter([BODY[: MIB + 7], b"", BODY[MIB + 7 :]]) if chunked else BODY
    answer = api.put(f"/v1/{kind}/{row.id}/content", content=content, headers={"Content-Digest": _digest(BODY)})
    assert answer.status_code == 202, answer.text
    assert answer.json()["status"] == "queued"
    with database.read() as session:
        key = session.get_one(type(row), row.id).upload_key
    assert key.startswith(f"{kind}/{row.id}/upload-")
    assert _stored(storage, key) == BODY
    assert queue.sent == [(type(row).TASK, row.id)]
    assert _parts(settings) == []


def test_content_is_given_once(api: TestClient, database: Database, storage: Storage, row: Dataset, path: str):
    assert api.put(path, content=b"first").status_code == 202
    before = _state(database, row)
    answer = api.put(path, content=b"second")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert _state(database, row) == before
    assert _stored(storage, before[1]) == b"first"


def test_of_two_uploads_at_once_one_wins_and_keeps_its_object(
    api: TestClient, database: Database, storage: Storage, queue: RecordingQueue, row: Dataset, path: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    both_are_stored = threading.Barrier(2)
    put_file = storage.put_file

    def _put_file(key: str, file: Path):
        stored = put_file(key, file)
        both_are_stored.wait(20)
        return stored

    monkeypatch.setattr(storage, "put_file", _put_file)
    bodies, answers = [b"one", b"two"], {}
    race(lambda number: answers.update({number: api.put(path, content=bodies[number])}), 2)
    statuses = {number: answer.status_code for number, answer in answers.items()}
    assert sorted(statuses.values()) == [202, 409]
    winner = next(number for number, status in statuses.items() if status == 202)
    status, key = _state(database, row)
    assert status == "queued"
    assert _stored(storage, key) == bodies[winner]
    assert storage.list(f"datasets/{row.id}") == [key]
    assert len(queue.sent) == 1


def _still_waits(api: TestClient, database: Database, storage: Storage, settings: Settings, row: Dataset) -> None:
    assert _state(database, row) == ("awaiting_upload", None)
    assert _parts(settings) == []
    assert storage.list(f"datasets/{row.id}") == []
    assert api.put(f"/v1/datasets/{row.id}/content", content=BODY).status_code == 202


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (BODY, {"Content-Digest": _digest(b"other")}, 400, "upload_incomplete"),
        (BODY, {"Content-Length": str(len(BODY) + 1)}, 400, "upload_incomplete"),
        (BODY, {"Content-Length": str(4 * MIB + 1)}, 413, "upload_too_large"),
        ([BODY, BODY, b"x"], {}, 413, "upload_too_large"),
        (b"", {}, 422, "empty_upload"),
        ([b""], {}, 422, "empty_upload"),
        (BODY, {"Content-Digest": "sha-256=nonsense"}, 422, "bad_digest"),
        (BODY, {"Content-Digest": "sha-256=:AAAA:"}, 422, "bad_digest"),
        (BODY, {"Content-Digest": "md5=:AAAA:"}, 422, "bad_digest"),
    ],
)
def test_a_bad_upload_changes_nothing_and_can_be_repeated(
    api: TestClient, database: Database, storage: Storage, settings: Settings, queue: RecordingQueue, row: Dataset,
    path: str, content, headers: dict[str, str], status: int, code: str,
):  # fmt: skip
    answer = api.put(path, content=iter(content) if isinstance(content, list) else content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert queue.sent == []
    _still_waits(api, database, storage, settings, row)


def test_an_upload_as_large_as_the_limit_is_taken(api: TestClient, path: str):
    assert api.put(path, content=iter([BODY, BODY])).status_code == 202


def test_other_digests_beside_ours_do_not_matter(api: TestClient, path: str):
    headers = {"Content-Digest": f"sha-512=:AAAA:, {_digest(BODY)}"}
    assert api.put(path, content=BODY, headers=headers).status_code == 202


def _scope(path: str, tenant: Tenant) -> dict:
    headers = [(b"authorization", f"Bearer {tenant.key}".encode()), (b"content-length", b"100"), (b"host", b"x")]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "PUT", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip


def _broken_upload(app: FastAPI, client: TestClient, path: str, tenant: Tenant, messages: list[dict]) -> int:
    """Drive the application as a server does whose client sends `messages` and then nothing."""
    sent: list[dict] = []

    async def _receive() -> dict:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def _send(message: dict) -> None:
        sent.append(message)

    client.portal.call(app, _scope(path, tenant), _receive, _send)
    return int(sent[0]["status"])


def test_a_client_that_goes_away_leaves_nothing(
    app: FastAPI, api: TestClient, database: Database, storage: Storage, settings: Settings, alice: Tenant,
    row: Dataset, path: str,
):  # fmt: skip
    messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]
    assert _broken_upload(app, api, path, alice, messages) == 400
    _still_waits(api, database, storage, settings, row)


def test_a_client_that_falls_silent_is_given_up(
    app: FastAPI, api: TestClient, database: Database, storage: Storage, settings: Settings, alice: Tenant,
    row: Dataset, path: str, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(uploads, "IDLE_S", 0.05)
    messages = [{"type": "http.request", "body": b"half", "more_body": True}]
    assert _broken_upload(app, api, path, alice, messages) == 400
    monkeypatch.undo()
    _still_waits(api, database, storage, settings, row)


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(errno.ENOSPC, 507, "storage_full"), (errno.EDQUOT, 507, "storage_full"), (errno.EIO, 503, "unavailable")],
)
@pytest.mark.parametrize("where", ["scratch", "store"])
def test_a_failing_disk_changes_nothing(
    api: TestClient, database: Database, storage: Storage, settings: Settings, row: Dataset, path: str,
    monkeypatch: pytest.MonkeyPatch, number: int, status: int, code: str, where: str,
):  # fmt: skip
    def _fail(*_args: object, **_more: object) -> None:
        raise OSError(number, "disk trouble at /secret/place")

    if where == "store":
        monkeypatch.setattr(storage, "put_file", _fail)
    else:
        monkeypatch.setattr(uploads, "run_in_threadpool", _fail)
    answer = api.put(path, content=BODY)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "/secret/place" not in answer.text
    monkeypatch.undo()
    _still_waits(api, database, storage, settings, row)


def test_abandoned_parts_are_removed(settings: Settings):
    folder = settings.scratch / "uploads"
    folder.mkdir(parents=True)
    for name, age_s in (("old.part", 4000), ("new.part", 10)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    uploads.remove_abandoned(settings)
    assert [path.name for path in folder.iterdir()] == ["new.part"]
