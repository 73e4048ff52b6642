"""A database, an object store and rows to work on, all in one temporary directory."""

import hashlib
import io
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.db import Database
from app.ids import new_id
from app.models import Artifact, Base, Checkpoint, Dataset, Job, JobEvent, Leased, Tenant
from app.settings import Settings
from app.storage import Storage, Stored
from worker.supervisor import Supervisor
from worker.tasks import HANDLERS
from worker.tasks.base import Context

SCRIPTED = (sys.executable, "-m", "tests.support.scripted_run")
DEADLINE_S = 20.0


class FlakyDatabase(Database):
    """Fails the next `failures` sessions like a database that does not answer.

    Of the next `lost_answers` commits the answer is lost: they succeed, but raise an error.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.failures = 0
        self.lost_answers = 0
        self.failed = threading.Event()

    def _maybe_fail(self) -> None:
        if self.failures:
            self.failures -= 1
            self.failed.set()
            raise OperationalError("SELECT 1", {}, Exception("connection refused"))

    @contextmanager
    def read(self) -> Iterator[Session]:
        self._maybe_fail()
        with super().read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        self._maybe_fail()
        with super().write() as session:
            yield session
        if self.lost_answers:
            self.lost_answers -= 1
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))


class FlakyStorage(Storage):
    """Fails to put the next `failures` files whose key contains `match`, and to get any while it is `unreadable`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.failures = 0
        self.match = ""
        self.unreadable = False
        self.refused = 0

    def get_file(self, key: str, path: Path) -> None:
        if self.unreadable:
            self.refused += 1
            raise OSError(5, "Input/output error")
        super().get_file(key, path)

    def put_file(self, key: str, path: Path) -> Stored:
        if self.failures and self.match in key:
            self.failures -= 1
            raise OSError(28, "No space left on device")
        return super().put_file(key, path)


class World:
    def __init__(self, home: Path, *, database_url: str = "", storage_url: str = "", **settings: Any) -> None:
        # One failure ends a row, unless the test is about retries.
        values: dict[str, Any] = {"lease_s": 20.0, "cancel_grace_s": 10.0, "max_attempts": 1, **settings}
        urls: dict[str, Any] = {"database_url": database_url, "redis_url": "", "storage_url": storage_url}
        self.settings = Settings(home=home, **urls, **values)
        self.settings.home.mkdir(exist_ok=True)
        self.database = FlakyDatabase(self.settings.database_url)
        self.storage = FlakyStorage(self.settings.storage_url)
        self.context = Context(self.database, self.storage, self.settings)
        self.stop = threading.Event()
        self.home = self.settings.home
        Base.metadata.create_all(self.database.engine)
        self.tenant_id = self.add(Tenant(id=new_id("tenant"), name="team")).id

    def add(self, row: Any) -> Any:
        with self.database.write() as session:
            session.add(row)
        return row

    def put(self, key: str, data: bytes) -> Stored:
        path = self.home / "to-be-put"
        path.write_bytes(data)
        return self.storage.put_file(key, path)

    def ready_dataset(self, content: bytes = b"{}") -> Dataset:
        dataset_id = new_id("ds")
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            member = tarfile.TarInfo("dataset.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        stored = self.put(f"datasets/{dataset_id}/dataset-1.tar", data.getvalue())
        content_hash = "sha256:" + hashlib.sha256(content).hexdigest()
        values = {"storage_key": stored.key, "content_hash": content_hash}
        return self.dataset(id=dataset_id, status="ready", **values)

    def dataset(self, **values: Any) -> Dataset:
        defaults = {"id": new_id("ds"), "tenant_id": self.tenant_id, "name": "cells", "status": "queued"}
        source = {"source": {"kind": "upload"}, "max_dropped_fraction": 0.05}
        return self.add(Dataset(**(defaults | source | values)))

    def checkpoint(self, **values: Any) -> Checkpoint:
        defaults = {"id": new_id("ckpt"), "tenant_id": self.tenant_id, "name": "weights", "status": "queued"}
        return self.add(Checkpoint(**(defaults | values)))

    def job(self, *script: Any, teacher: Any = None, **values: Any) -> Job:
        spec = {"teacher": teacher, "student": {"initial_weights": "random"}, "script": script}
        defaults = {"id": new_id("job"), "tenant_id": self.tenant_id, "name": "small", "status": "queued"}
        dataset_id = values.pop("dataset_id", None) or self.ready_dataset().id
        return self.add(Job(**(defaults | {"spec": spec, "labels": {}, "dataset_id": dataset_id} | values)))

    def set(self, row: Leased, **values: Any) -> None:
        with self.database.write() as session:
            session.execute(update(type(row)).where(type(row).id == row.id).values(**values))

    def now(self, row: Any) -> Any:
        with self.database.read() as session:
            return session.get(type(row), row.id)

    def all(self, model: Any) -> list[Any]:
        with self.database.read() as session:
            return list(session.scalars(select(model)))

    def codes(self, job: Job) -> list[str]:
        with self.database.read() as session:
            return list(session.scalars(select(JobEvent.code).where(JobEvent.job_id == job.id).order_by(JobEvent.id)))

    def artifacts(self, job: Job) -> dict[str, Artifact]:
        with self.database.read() as session:
            return {row.name: row for row in session.scalars(select(Artifact).where(Artifact.job_id == job.id))}

    def last_message(self, job: Job) -> str:
        return [event.message for event in self.all(JobEvent) if event.job_id == job.id][-1]

    def content(self, key: str) -> bytes:
        return b"".join(self.storage.stream(key))

    def work(self, row: Leased, *, context: Context | None = None) -> None:
        context = context or self.context
        supervisor = Supervisor(context, owner="test", stop=self.stop, command=SCRIPTED, tick_s=0.02, backoff_s=0.01)
        supervisor.work(HANDLERS[type(row).TASK](context))

    def next_attempt(self, job: Job, *script: Any) -> None:
        """Work on the job as if its pause were over, with a new script."""
        self.set(job, not_before=None, spec={**self.now(job).spec, "script": script})
        self.work(job)

    @contextmanager
    def working(self, row: Leased) -> Iterator[None]:
        """Work on the row in another thread; the end of the block waits for it."""
        errors: list[BaseException] = []

        def _work() -> None:
            try:
                self.work(row)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=_work)
        thread.start()
        try:
            yield
        finally:
            thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the supervisor does not end"
        if errors:
            raise errors[0]

    def scratch_left(self) -> list[str]:
        runs = self.settings.scratch / "runs"
        return sorted(path.name for path in runs.iterdir()) if runs.exists() else []


def log_metrics(step: int, loss: float | None) -> list[Any]:
    """Return the step of a script that logs a loss."""
    return ["event", "metrics", "student", {"step": step, "epoch": step / 10, "values": {"loss/total": loss}}]


def progress(phase: str, fraction: float) -> list[Any]:
    """Return the step of a script that reports progress."""
    return ["event", "progress", phase, {"fraction": fraction}]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
