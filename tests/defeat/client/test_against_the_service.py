"""The SDK and the command against the service itself: SQLite, a real socket, and no worker."""

import hashlib
import json
import os
import socket
import threading
import time
from datetime import timedelta

import httpx2
import pytest
import uvicorn
from typer.testing import CliRunner

from app.db import Database, utcnow
from app.ids import new_id
from app.keys.service import create_key
from app.main import create_app
from app.migrate import upgrade
from app.models import Artifact, Checkpoint, Dataset, JobEvaluation, JobEvent, JobMetric
from app.settings import Settings
from app.storage import Storage
from defeat.cli.main import app
from defeat.client.client import Client
from defeat.client.errors import ApiError

CONTENT = os.urandom(3_000_000)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    # Nobody listens there: what the API would tell a worker is lost, which it must bear.
    settings = Settings(home=home, redis_url=f"redis+socket://{home}/nobody.sock", max_upload_bytes=4_000_000)
    upgrade(settings.database_url)
    return settings


@pytest.fixture(scope="module")
def database(settings):
    database = Database(settings.database_url)
    yield database
    database.dispose()


@pytest.fixture(scope="module")
def url(settings):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        _wait_for(lambda: httpx2.get(f"{address}/healthz").is_success)
        yield address
        server.should_exit = True
        thread.join(10)


def _wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@pytest.fixture
def key(settings, database, request):
    """The key of a tenant that has nothing yet."""
    with database.write() as session:
        return create_key(session, settings, request.node.name, "test")[1]


@pytest.fixture
def client(url, key):
    with Client(url, key, patience_s=3) as client:
        yield client


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "cells.zip"
    path.write_bytes(CONTENT)
    return path


def _make_ready(database, dataset_id):
    """Do to the dataset what a worker would."""
    with database.write() as session:
        row = session.get_one(Dataset, dataset_id)
        row.status, row.classes, row.format = "ready", ["RBC"], "coco"
        row.splits = {split: {"images": 20, "boxes": 30} for split in ("train", "val")}
        row.content_hash, row.finished_at = "sha256:0", utcnow()


@pytest.fixture
def job(client, database, archive):
    dataset = client.datasets.add(archive)
    _make_ready(database, dataset["id"])
    return client.jobs.submit(_spec(dataset["id"]))


def _spec(dataset_id):
    detector = {"architecture": "faster_rcnn", "backbone": "timm/mobilenetv3_small_050"}
    return {
        "name": "cells-small",
        "labels": {"team": "lab"},
        "dataset": dataset_id,
        "student": {"detector": detector},
        "distillation": {"method": "baseline"},
    }


def test_an_upload_arrives_as_it_was_sent(client, settings, database, archive):
    dataset = client.datasets.add(archive, name="cells", max_dropped_fraction=0.2)
    assert (dataset["status"], dataset["name"], dataset["max_dropped_fraction"]) == ("queued", "cells", 0.2)
    with database.read() as session:
        upload_key = session.get_one(Dataset, dataset["id"]).upload_key
    assert b"".join(Storage(settings.storage_url).stream(upload_key)) == CONTENT
    assert [row["id"] for row in client.datasets.list()] == [dataset["id"]]


def test_an_upload_that_is_too_large_is_refused_with_the_limit(client, tmp_path):
    path = tmp_path / "large.zip"
    with path.open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(ApiError, match="4000000") as caught:
        client.datasets.add(path)
    assert (caught.value.status, caught.value.code) == (413, "upload_too_large")
    [dataset] = client.datasets.list()
    assert dataset["status"] == "awaiting_upload"


def test_lists_go_over_pages(client, database, archive):
    checkpoint = client.checkpoints.add(archive, "0")
    made = [checkpoint["id"]]
    with database.write() as session:
        tenant_id = session.get_one(Checkpoint, checkpoint["id"]).tenant_id
        for index in range(1, 103):
            row = Checkpoint(id=new_id("ckpt"), tenant_id=tenant_id, name=str(index), status="queued")
            row.created_at = utcnow() + timedelta(0, index)
            session.add(row)
            made.append(row.id)
    assert [row["id"] for row in client.checkpoints.list()] == made[::-1]


def test_a_job_that_cannot_be_is_explained(client, archive):
    with pytest.raises(ApiError) as caught:
        client.jobs.validate({"name": "a", "epochs": 3})
    assert caught.value.status == 422
    assert "/dataset" in {error["pointer"] for error in caught.value.errors}
    assert "/epochs" in str(caught.value)


def test_a_job_is_watched_to_its_end(client, database, job):
    assert job["status"] == "queued"
    with database.write() as session:
        session.add_all(
            JobEvent(job_id=job["id"], level="info", code="c", message=str(i), created_at=utcnow() + timedelta(0, i))
            for i in range(150)
        )
        for subject in ("teacher", "student"):
            session.add_all(
                JobMetric(job_id=job["id"], subject=subject, step=step, epoch=0.1, values={"loss/total": 1.0})
                for step in range(1200)
            )
        session.add(JobEvaluation(job_id=job["id"], subject="student", epoch=1, metrics={"ap": 0.5}))
    updates = client.jobs.watch(job["id"], poll_s=0.01)
    first = next(updates)
    messages = [event["message"] for event in first["events"] if event["code"] == "c"]
    assert messages == [str(i) for i in range(150)]
    assert [row["step"] for row in first["metrics"]] == [*range(1200), *range(1200)]
    assert first["evaluations"][0]["metrics"]["ap"] == 0.5
    assert client.jobs.pause(job["id"])["status"] == "paused"
    assert client.jobs.resume(job["id"])["status"] == "queued"
    assert client.jobs.cancel(job["id"])["status"] == "cancelled"
    rest = list(updates)
    assert rest[-1]["job"]["status"] == "cancelled"
    assert not any(update["metrics"] or update["evaluations"] for update in rest)
    assert client.jobs.retry(job["id"], start="beginning")["status"] == "queued"
    assert list(client.jobs.metrics(job["id"])) == []


def test_jobs_are_found_by_their_members(client, job):
    for wanted in ({"status": "queued"}, {"dataset": job["dataset_id"]}, {"name": "cells"}):
        assert [row["id"] for row in client.jobs.list(**wanted)] == [job["id"]]
    assert list(client.jobs.list(status="failed")) == []
    resolved = client.jobs.validate(_spec(job["dataset_id"]))
    assert resolved == job["spec"]
    assert "schedule" in resolved


def test_an_artifact_is_downloaded_from_where_it_was_cut(client, settings, database, job, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    key = f"jobs/{job['id']}/artifacts/gallery/0.jpg"
    (tmp_path / "source").write_bytes(CONTENT)
    Storage(settings.storage_url).put_file(key, tmp_path / "source")
    with database.write() as session:
        session.add(
            Artifact(
                id="art_1",
                job_id=job["id"],
                name="gallery/0 a.jpg",
                kind="gallery",
                content_type="image/jpeg",
                storage_key=key,
                size_bytes=len(CONTENT),
                sha256=digest,
                details={},
            )
        )
    (tmp_path / f"a.jpg.{digest[:16]}.part").write_bytes(CONTENT[:2_000_000])
    seen = []
    client.jobs.download(job["id"], "gallery/0 a.jpg", tmp_path / "a.jpg", lambda done, total: seen.append(done))
    assert (tmp_path / "a.jpg").read_bytes() == CONTENT
    assert seen[0] > 2_000_000


def test_a_tenant_does_not_see_the_other_ones(client, url, settings, database, job):
    with database.write() as session:
        other_key = create_key(session, settings, "others", "test")[1]
    with Client(url, other_key) as other:
        assert list(other.jobs.list()) == []
        with pytest.raises(ApiError) as caught:
            other.jobs.get(job["id"])
    assert caught.value.status == 404


def test_the_command_submits_and_waits(url, key, client, database, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("DEFEAT_URL", url)
    monkeypatch.setenv("DEFEAT_API_KEY", key)
    runner = CliRunner()
    added = runner.invoke(app, ["datasets", "add", str(archive), "--no-wait", "--json"])
    dataset_id = json.loads(added.stdout)["id"]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(_spec("ds_0")))
    arguments = [str(spec), "--set", f"dataset={dataset_id}", "--json"]
    refused = runner.invoke(app, ["jobs", "submit", *arguments])
    assert (refused.exit_code, json.loads(refused.stdout)["error"]["code"]) == (1, "dataset_not_ready")
    _make_ready(database, dataset_id)
    submitted = runner.invoke(app, ["jobs", "submit", *arguments])
    job_id = json.loads(submitted.stdout)["id"]
    assert runner.invoke(app, ["jobs", "cancel", job_id]).exit_code == 0
    watched = runner.invoke(app, ["jobs", "watch", job_id, "--json"])
    assert watched.exit_code == 1
    assert json.loads(watched.stdout.splitlines()[-1])["status"] == "cancelled"
    assert runner.invoke(app, ["catalog"]).exit_code == 0


def test_usage_is_read(client, archive):
    client.datasets.add(archive)
    usage = client.usage()
    assert usage["storage"]["uploads_bytes"] == len(CONTENT)
    assert usage["quotas"]["datasets"] == {"used": 1, "limit": None}
