"""Retention: what each rule lets go, and everything that it must leave."""

import json
import os
import threading
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from app.db import Database, utcnow
from app.ids import new_id
from app.models import Artifact, Checkpoint, Dataset, Job, JobEvent, JobMetric, SweepPass
from app.retention import history, objects, rules, service
from app.settings import DAY_S, Settings
from app.states import JOB_MOVES
from app.storage import Found, Storage
from tests.app.conftest import ONE_DATABASE, Tenant
from tests.support import rows as seed
from tests.support.racing import race

LONG_AGO = timedelta(days=400)
OPEN = sorted(state for state in JOB_MOVES if state not in ("succeeded", "failed", "cancelled"))
EVERYTHING = {"keep_history_s": 0.0, "keep_teachers_s": 30 * DAY_S}


# When objects were written, where it is not now. A server sets its objects' times itself, so there a scan is told.
WRITTEN: dict[str, datetime] = {}


@pytest.fixture
def storage(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Storage:
    WRITTEN.clear()
    scan = Storage.scan

    def _scan(self: Storage, prefix: str, *, after: str | None, limit: int) -> list[Found]:
        found = scan(self, prefix, after=after, limit=limit)
        return [replace(one, written_at=WRITTEN[one.key]) for one in found]

    if settings.storage_url.startswith("s3"):
        monkeypatch.setattr(Storage, "scan", _scan)
    return Storage(settings.storage_url)


@pytest.fixture
def strict(settings: Settings) -> Settings:
    """Settings with every rule switched on."""
    return settings.model_copy(update=EVERYTHING | {"history_points": 4})


def _ago(**duration: float) -> datetime:
    return utcnow() - timedelta(**duration)


def _put(storage: Storage, settings: Settings, key: str, *, days: float = 400) -> str:
    """Store an object that was written so long ago."""
    path = settings.home / "object"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345")
    storage.put_file(key, path)
    WRITTEN[key] = _ago(days=days)
    if (file := _file(settings, key)) is not None:
        _age(file, WRITTEN[key])
    return key


def _age(file: Path, written: datetime) -> None:
    os.utime(file, (written.timestamp(), written.timestamp()))


def _file(settings: Settings, key: str) -> Path | None:
    """Return where a local store keeps an object; None on a server."""
    url = urlsplit(settings.storage_url)
    return Path(url.path) / key if url.scheme == "file" else None


def _gone(database: Database, model: Any, row_id: str) -> bool:
    with database.read() as session:
        return session.get(model, row_id) is None


def _objects(storage: Storage, settings: Settings) -> set[str]:
    """Return the keys of all there is; in a directory every file, with what writes left that never ended."""
    root = _file(settings, "")
    if root is not None:
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {key for folder in ("datasets", "checkpoints", "jobs", "somebody") for key in storage.list(folder)}


def test_defaults_delete_nothing_that_anybody_could_miss(
    database: Database, storage: Storage, settings: Settings, alice: Tenant
):
    data = seed.dataset(database, alice.id, created_at=_ago(days=400))
    data_key = _put(storage, settings, f"datasets/{data.id}/dataset-1.tar")
    teacher = seed.checkpoint(database, alice.id, source_job_id="job_1", finished_at=_ago(days=400))
    teacher_key = _put(storage, settings, f"checkpoints/{teacher.id}/weights-1.safetensors")
    job = seed.job(database, alice.id, data.id, status="succeeded", finished_at=_ago(days=400))
    artifact_key = _put(storage, settings, f"jobs/{job.id}/artifacts/1/log.txt")
    with database.write() as session:
        session.get_one(Dataset, data.id).storage_key = data_key
        session.get_one(Checkpoint, teacher.id).storage_key = teacher_key
        session.add(_artifact(job.id, "log.txt", artifact_key))
        session.add_all(_metrics(job.id, 5000))
        session.add_all(JobEvent(job_id=job.id, level="info", code="x", message="x") for _ in range(2000))
    report = service.run(database, storage, settings)
    assert not any(report.removed.values())
    assert (report.more, report.orphan_bytes) == (False, 0)
    assert _objects(storage, settings) == {data_key, teacher_key, artifact_key}


def _artifact(job_id: str, name: str, key: str) -> Artifact:
    return Artifact(
        id=new_id("art"),
        job_id=job_id,
        name=name,
        kind="log",
        content_type="text/plain",
        storage_key=key,
        size_bytes=5,
        sha256="0" * 64,
        details={},
    )


def _metrics(job_id: str, count: int, subject: str = "student", every: int = 1) -> list[JobMetric]:
    return [
        JobMetric(job_id=job_id, subject=subject, step=number * every, epoch=0.0, values={"loss/total": 1.0})
        for number in range(count)
    ]


def test_training_checkpoints_of_jobs_that_ended_long_ago_go(
    database: Database, storage: Storage, settings: Settings, alice: Tenant
):
    data = seed.dataset(database, alice.id)
    kept, swept = [], []
    for status in JOB_MOVES:
        for days, old in ((29, False), (31, True)):
            job = seed.job(database, alice.id, data.id, status=status, finished_at=_ago(days=days))
            key = _put(storage, settings, f"jobs/{job.id}/resume/1-1.pt")
            with database.write() as session:
                session.get_one(Job, job.id).resume_key = key
            (swept if old and status not in OPEN else kept).append((job.id, key))
    report = service.run(database, storage, settings)
    assert sorted(report.removed["keep_training_checkpoints_s"]) == sorted(key for _, key in swept)
    assert _objects(storage, settings) == {key for _, key in kept}
    with database.read() as session:
        assert {row.id for row in session.scalars(select(Job).where(Job.resume_key.is_(None)))} == {
            job_id for job_id, _ in swept
        }


@pytest.mark.parametrize("make", [seed.dataset, seed.checkpoint])
def test_rows_whose_content_never_came_go(
    database: Database, storage: Storage, settings: Settings, alice: Tenant, make: Any
):
    old = make(database, alice.id, status="awaiting_upload", created_at=_ago(days=8))
    young = make(database, alice.id, status="awaiting_upload", created_at=_ago(days=6))
    others = [
        make(database, alice.id, status=status, created_at=_ago(days=400))
        for status in ("queued", "checking", "ready", "invalid", "failed")
    ]
    assert service.run(database, storage, settings).removed["keep_empty_uploads_s"] == [old.id]
    assert _gone(database, type(old), old.id)
    assert not any(_gone(database, type(row), row.id) for row in (young, *others))


@pytest.mark.parametrize(("make", "folder"), [(seed.dataset, "datasets"), (seed.checkpoint, "checkpoints")])
def test_uploads_of_failed_checks_go_and_their_rows_stay(
    database: Database, storage: Storage, settings: Settings, alice: Tenant, make: Any, folder: str
):
    rows = {}
    for status, days in (("failed", 31), ("failed", 29), ("queued", 400), ("checking", 400)):
        row = make(database, alice.id, status=status, finished_at=_ago(days=days), upload_bytes=5)
        key = _put(storage, settings, f"{folder}/{row.id}/upload-1")
        with database.write() as session:
            session.get_one(type(row), row.id).upload_key = key
        rows[status, days] = row, key
    row, key = rows.pop(("failed", 31))
    assert service.run(database, storage, settings).removed["keep_failed_uploads_s"] == [key]
    with database.read() as session:
        fresh = session.get_one(type(row), row.id)
    assert (fresh.status, fresh.upload_key, fresh.upload_bytes) == ("failed", None, None)
    assert _objects(storage, settings) == {key for _, key in rows.values()}


def _teacher(database: Database, tenant: Tenant, **values: Any) -> Checkpoint:
    defaults = {"source_job_id": "job_1", "finished_at": _ago(days=60), "created_at": _ago(days=60)}
    return seed.checkpoint(database, tenant.id, **defaults | values)


@pytest.mark.parametrize("status", ["queued", "succeeded"])
def test_only_trained_teachers_that_nobody_wants_go(
    database: Database, storage: Storage, strict: Settings, alice: Tenant, bob: Tenant, status: str
):
    data = seed.dataset(database, alice.id)
    forgotten, used, initial, student, fetched, young = (
        _teacher(database, alice, **values)
        for values in ({}, {}, {}, {}, {"downloaded_at": _ago(days=29)}, {"finished_at": _ago(days=29)})
    )
    uploaded = _teacher(database, alice, source_job_id=None)
    for spec in (
        {"teacher": {"source": "checkpoint", "id": used.id}, "student": {}},
        {"teacher": {"source": "train", "initial_weights": initial.id}, "student": {"initial_weights": "random"}},
        {"teacher": None, "student": {"initial_weights": student.id}},
    ):
        seed.job(database, alice.id, data.id, status=status, spec=spec, finished_at=_ago(days=60))
    report = service.run(database, storage, strict)
    assert report.removed["keep_teachers_s"] == [forgotten.id]
    assert _gone(database, Checkpoint, forgotten.id)
    assert not any(_gone(database, Checkpoint, row.id) for row in (used, initial, student, fetched, young, uploaded))


def test_a_download_is_noted_once_an_hour(
    api: TestClient, database: Database, settings: Settings, storage: Storage, alice: Tenant
):
    row = _teacher(database, alice, size_bytes=5, sha256="0" * 64, storage_key="checkpoints/x/weights")
    _put(storage, settings, "checkpoints/x/weights")

    def _noted() -> datetime:
        assert api.get(f"/v1/checkpoints/{row.id}/content").status_code == 200
        with database.read() as session:
            moment = session.get_one(Checkpoint, row.id).downloaded_at
        assert moment is not None
        return moment

    first = _noted()
    assert first > _ago(minutes=1)
    assert _noted() == first
    earlier = _ago(hours=2)
    with database.write() as session:
        session.execute(update(Checkpoint).values(downloaded_at=earlier))
    assert _noted() > earlier


def test_a_history_is_thinned_to_evenly_spread_points(
    database: Database, storage: Storage, strict: Settings, alice: Tenant
):
    data = seed.dataset(database, alice.id)
    job = seed.job(database, alice.id, data.id, status="failed", finished_at=_ago(days=1))
    short = seed.job(database, alice.id, data.id, status="succeeded", finished_at=_ago(days=1))
    running = seed.job(database, alice.id, data.id, status="running", finished_at=_ago(days=1))
    levels = ["info", "warn", "error", "info", "info", "info", "info", "info"]
    with database.write() as session:
        session.add_all(_metrics(job.id, 100, every=10) + _metrics(job.id, 5, "teacher"))
        session.add_all(_metrics(short.id, 4) + _metrics(running.id, 50))
        for level in levels:
            session.add(JobEvent(job_id=job.id, level=level, code="x", message="x"))
            session.flush()
    assert service.run(database, storage, strict).removed["keep_history_s"] == [job.id]
    assert _steps(database, job.id, "student") == [0, 330, 660, 990]
    assert _steps(database, job.id, "teacher") == [0, 1, 2, 4]
    assert _steps(database, short.id, "student") == [0, 1, 2, 3]
    assert len(_steps(database, running.id, "student")) == 50
    with database.read() as session:
        kept = session.scalars(select(JobEvent.level).where(JobEvent.job_id == job.id).order_by(JobEvent.id)).all()
        assert session.get_one(Job, job.id).history_swept_at is not None
        assert session.get_one(Job, running.id).history_swept_at is None
    assert kept == ["warn", "error", "info", "info", "info", "info"]
    assert not service.run(database, storage, strict).removed["keep_history_s"]


def _steps(database: Database, job_id: str, subject: str) -> list[int]:
    steps = select(JobMetric.step).where(JobMetric.job_id == job_id, JobMetric.subject == subject)
    with database.read() as session:
        return list(session.scalars(steps.order_by(JobMetric.step)))


@ONE_DATABASE
def test_a_long_history_is_thinned_over_several_passes(
    database: Database, storage: Storage, strict: Settings, alice: Tenant, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "ROWS", 40)
    data = seed.dataset(database, alice.id)
    job = seed.job(database, alice.id, data.id, status="succeeded", finished_at=_ago(days=1))
    with database.write() as session:
        session.add_all(_metrics(job.id, 200))
    report = service.run(database, storage, strict)
    assert report.more
    assert 100 < len(_steps(database, job.id, "student")) < 200
    for _ in range(10):
        report = service.run(database, storage, strict)
    assert not report.more
    steps = _steps(database, job.id, "student")
    assert (len(steps), steps[0], steps[-1]) == (4, 0, 199)


@pytest.fixture
def store(database: Database, storage: Storage, settings: Settings, alice: Tenant) -> tuple[set[str], set[str]]:
    """A store with objects to keep and orphans; returned as keys of both."""
    data = seed.dataset(database, alice.id)
    kept, orphans = set(), set()
    for status in ("queued", "checking", "awaiting_upload", "ready", "invalid", "failed"):
        for make, folder in ((seed.dataset, "datasets"), (seed.checkpoint, "checkpoints")):
            row = make(database, alice.id, status=status)
            named = {
                "upload_key": _put(storage, settings, f"{folder}/{row.id}/upload-1"),
                "storage_key": _put(storage, settings, f"{folder}/{row.id}/made-1"),
            }
            with database.write() as session:
                session.execute(update(type(row)).where(type(row).id == row.id).values(**named))
            kept |= set(named.values())
            other = _put(storage, settings, f"{folder}/{row.id}/made-0")
            (kept if status in ("queued", "checking", "awaiting_upload") else orphans).add(other)
    for status in JOB_MOVES:
        job = seed.job(database, alice.id, data.id, status=status)
        resume = _put(storage, settings, f"jobs/{job.id}/resume/1-2.pt")
        artifact = _put(storage, settings, f"jobs/{job.id}/artifacts/1/gallery/0.jpg")
        with database.write() as session:
            session.get_one(Job, job.id).resume_key = resume
            session.add(_artifact(job.id, "gallery/0.jpg", artifact))
        kept |= {resume, artifact}
        teacher = f"checkpoints/ckpt_{job.id.removeprefix('job_')}/weights-1.safetensors"
        others = {
            _put(storage, settings, key)
            for key in (f"jobs/{job.id}/resume/1-1.pt", f"jobs/{job.id}/artifacts/0/log.txt", teacher)
        }
        (kept if status in OPEN else orphans).update(others)
    orphans |= {
        _put(storage, settings, key)
        for key in (
            "datasets/ds_gone/dataset-1.tar",
            "checkpoints/ckpt_gone/x",
            "jobs/job_gone/artifacts/1/a",
            "jobs/x",
        )
    }
    kept |= {
        _put(storage, settings, "datasets/ds_gone/dataset-2.tar", days=6.9),
        _put(storage, settings, "somebody/elses/file"),
    }
    return kept, orphans


@pytest.mark.parametrize("batch", [3, 1000])
def test_objects_that_no_row_refers_to_go(
    database: Database, storage: Storage, settings: Settings, store: tuple[set[str], set[str]], batch: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(objects, "BATCH", batch)
    kept, orphans = store
    broken_off = "datasets/ds_gone/dataset-3.tar#123456"  # of a write that never ended, in a directory
    if (file := _file(settings, broken_off)) is not None:
        file.write_bytes(b"12345")
        _age(file, _ago(days=400))
        orphans.add(broken_off)
    with database.write() as session:
        assert service.begin(session, utcnow())
    removed: list[str] = []
    passes = 0
    more = True
    while more:
        report = service.run(database, storage, settings)
        removed += report.removed["keep_orphans_s"]
        more = report.more
        passes += 1
    assert sorted(removed) == sorted(orphans)
    assert _objects(storage, settings) == kept
    assert (passes > 1) == (batch == 3)
    with database.read() as session:
        assert session.get_one(SweepPass, "retention").cursor is None


def test_a_dry_run_tells_and_does_nothing(
    database: Database, storage: Storage, strict: Settings, alice: Tenant, store: tuple[set[str], set[str]],
    monkeypatch: pytest.MonkeyPatch, admin,
):  # fmt: skip
    waiting = seed.dataset(database, alice.id, status="awaiting_upload", created_at=_ago(days=8))
    job = seed.job(
        database, alice.id, seed.dataset(database, alice.id).id, status="failed", finished_at=_ago(days=31),
        resume_key=_put(storage, strict, "jobs/job_1/resume/1-1.pt"),
    )  # fmt: skip
    with database.write() as session:
        session.add_all(_metrics(job.id, 50))
    before = _objects(storage, strict)
    monkeypatch.setattr("app.ops.admin.get_settings", lambda: strict)
    code, out, _ = admin("retention", "--dry-run")
    assert code == 0
    told = json.loads(out)
    assert (told["dry_run"], told["more"], told["orphan_bytes"]) == (True, False, 5 * (len(store[1]) + 1))
    assert told["keep_empty_uploads_s"] == [waiting.id]
    assert told["keep_training_checkpoints_s"] == [job.resume_key]
    assert told["keep_history_s"] == [job.id]
    assert set(told["keep_orphans_s"]) == {*store[1], job.resume_key}
    assert _objects(storage, strict) == before
    assert not _gone(database, Dataset, waiting.id)
    assert len(_steps(database, job.id, "student")) == 50
    code, out, _ = admin("retention")
    assert code == 0
    done = json.loads(out.splitlines()[0])
    assert done["keep_empty_uploads_s"] == [waiting.id]
    assert _gone(database, Dataset, waiting.id)


def test_an_orphan_that_cannot_be_deleted_does_not_stop_the_others(
    database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    keys = [_put(storage, settings, f"jobs/job_gone/{name}") for name in "abc"]
    delete = Storage.delete

    def _fails_for_one(self: Storage, key: str) -> None:
        if key == keys[0]:
            raise OSError("access denied")
        delete(self, key)

    monkeypatch.setattr(Storage, "delete", _fails_for_one)
    service.run(database, storage, settings)
    assert _objects(storage, settings) == {keys[0]}


def test_one_process_at_a_time_and_not_too_often(
    database: Database, storage: Storage, settings: Settings, alice: Tenant
):
    rows = [seed.dataset(database, alice.id, status="awaiting_upload", created_at=_ago(days=8)).id for _ in range(3)]
    reports: dict[int, service.Report | None] = {}

    def _run(number: int) -> None:
        reports[number] = service.run_if_due(database, storage, settings)

    race(_run, 6)
    done = [report for report in reports.values() if report is not None]
    assert len(done) == 1
    assert sorted(done[0].removed["keep_empty_uploads_s"]) == sorted(rows)
    with database.write() as session:
        session.get_one(SweepPass, "retention").began_at = _ago(seconds=settings.retention_s + 1)
    assert service.run_if_due(database, storage, settings) is not None


def test_passes_that_meet_delete_everything_once(
    database: Database, storage: Storage, settings: Settings, alice: Tenant, store: tuple[set[str], set[str]],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(rules, "LIMIT", 3)
    rows = [seed.dataset(database, alice.id, status="awaiting_upload", created_at=_ago(days=8)).id for _ in range(20)]
    removed: list[str] = []

    def _run(_number: int) -> None:
        for _ in range(10):
            removed.extend(service.run(database, storage, settings).removed["keep_empty_uploads_s"])

    race(_run, 3)
    assert sorted(removed) == sorted(rows)
    assert _objects(storage, settings) == store[0]


@ONE_DATABASE
def test_the_service_runs_retention_by_itself(app: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    ran = threading.Event()
    monkeypatch.setattr("app.main.retention.run_if_due", lambda *_args: ran.set())
    app.state.settings = settings.model_copy(update={"sweep_s": 0.01})
    monkeypatch.setattr("app.main.sweep", lambda *_args: 0)
    with TestClient(app):
        assert ran.wait(20)


def test_rules_that_are_off_do_nothing(database: Database, storage: Storage, settings: Settings, alice: Tenant):
    off = settings.model_copy(update={name: None for name in type(settings).model_fields if name.startswith("keep_")})
    row = seed.dataset(database, alice.id, status="awaiting_upload", created_at=_ago(days=400))
    key = _put(storage, settings, "jobs/job_gone/x")
    assert not any(service.run(database, storage, off).removed.values())
    assert not _gone(database, Dataset, row.id)
    assert _objects(storage, settings) == {key}


def test_reduced_histories_are_read_as_before(
    api: TestClient, database: Database, storage: Storage, strict: Settings, alice: Tenant
):
    job = seed.job(
        database, alice.id, seed.dataset(database, alice.id).id, status="succeeded", finished_at=_ago(days=1)
    )
    with database.write() as session:
        session.add_all(_metrics(job.id, 100))
    service.run(database, storage, strict)
    page = api.get(f"/v1/jobs/{job.id}/metrics").json()
    assert [point["step"] for point in page["data"]] == [0, 33, 66, 99]
    assert not page["has_more"]
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(JobMetric)) == 4


def test_never_is_written_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DEFEAT_KEEP_ORPHANS_S", "none")
    assert Settings(home=tmp_path).keep_orphans_s is None
