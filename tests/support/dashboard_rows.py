"""Fill a service with jobs and datasets as real ones look, for the dashboard's tests and for screenshots.

`python -m tests.support.dashboard_rows` seeds the service that the environment names (`DEFEAT_HOME`, `DATABASE_URL`,
…), whose database must have been migrated and hold a tenant: the oldest one gets the rows.
"""

import hashlib
import json
import random
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db import Database, utcnow
from app.ids import new_id
from app.models import Artifact, Dataset, Job, JobEvent, Tenant
from app.settings import get_settings
from app.storage import Storage
from tests.support.dashboard_images import draw_cells
from tests.support.dashboard_samples import CLASSES, EPOCHS, OOM, SPLITS, evaluations, losses, report, spec


@dataclass(frozen=True)
class Seeded:
    """Ids of what was made."""

    tenant_id: str
    dataset: str
    invalid_dataset: str
    succeeded: str
    running: str
    queued: str
    failed: str
    cancelled: str
    baseline: str
    at_teacher: str


class Seeder:
    """Adds rows and objects for one tenant, each row a little younger than the one before."""

    def __init__(self, session: Session, storage: Storage, tenant_id: str) -> None:
        self.session = session
        self.storage = storage
        self.tenant_id = tenant_id
        self._moment = utcnow() - timedelta(days=2)

    def dataset(self, name: str, *, status: str = "ready", **values: Any) -> Dataset:
        """Add a dataset."""
        row = Dataset(
            id=new_id("ds"),
            tenant_id=self.tenant_id,
            name=name,
            status=status,
            source={"kind": "upload"},
            max_dropped_fraction=0.05,
            created_at=self._tick(),
            **values,
        )
        self.session.add(row)
        self.session.flush()
        return row

    def job(self, name: str, dataset: Dataset, *, status: str, age: timedelta, **values: Any) -> Job:
        """Add a job that was created `age` ago; `spec` may be given."""
        created = utcnow() - age
        row = Job(
            id=new_id("job"),
            tenant_id=self.tenant_id,
            name=name,
            status=status,
            dataset_id=dataset.id,
            created_at=created,
            **{"spec": spec(dataset.id, name), "labels": {}, **values},
        )
        self.session.add(row)
        self.session.flush()
        self.event(row, "info", "created", "The job was created.", created)
        return row

    def event(self, job: Job, level: str, code: str, message: str, when: datetime) -> None:
        """Add an event."""
        self.session.add(JobEvent(job_id=job.id, level=level, code=code, message=message, created_at=when))
        self.session.flush()

    def artifact(self, job: Job, name: str, kind: str, content_type: str, content: bytes) -> None:
        """Put an artifact into the store and record it."""
        key = f"jobs/{job.id}/artifacts/{name}"
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.storage.put_file(key, Path(file.name))
        self.session.add(
            Artifact(
                id=new_id("art"),
                job_id=job.id,
                name=name,
                kind=kind,
                content_type=content_type,
                storage_key=key,
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                details={},
            )
        )

    def gallery(self, job: Job, *, images: int = 6) -> None:
        """Add drawn images with ground truth, a teacher that is good and a student that is nearly as good."""
        index = []
        for number in range(images):
            content, truth = draw_cells(seed=number)
            name = f"gallery/{number}.jpg"
            self.artifact(job, name, "gallery", "image/jpeg", content)
            rng = random.Random(100 + number)
            index.append(
                {
                    "file": name,
                    "width": 320,
                    "height": 240,
                    "name": f"BloodImage_{number * 37 + 5:05d}.jpg",
                    "truth": truth,
                    "teacher": _detected(truth, rng, recall=0.97, jitter=1.5, least=0.7),
                    "student": _detected(truth, rng, recall=0.9, jitter=3.0, least=0.4),
                }
            )
        content = json.dumps({"classes": CLASSES, "images": index}).encode()
        self.artifact(job, "gallery.json", "gallery", "application/json", content)

    def _tick(self) -> datetime:
        self._moment += timedelta(minutes=7)
        return self._moment


def _detected(
    truth: list[dict[str, Any]], rng: random.Random, *, recall: float, jitter: float, least: float
) -> list[dict[str, Any]]:
    return [
        {
            "class": box["class"],
            "box": [round(value + rng.uniform(-jitter, jitter), 1) for value in box["box"]],
            "score": round(rng.uniform(least, 0.99), 4),
        }
        for box in truth
        if rng.random() < recall
    ]


def _datasets(seeder: Seeder) -> tuple[Dataset, Dataset]:
    found = report()
    common = {"format": "voc", "classes": CLASSES, "report": found}
    ready = seeder.dataset(
        "blood-cells",
        **common,
        splits=SPLITS,
        size_bytes=7_412_736,
        content_hash=f"sha256:{hashlib.sha256(b'cells').hexdigest()}",
        started_at=utcnow() - timedelta(days=2),
        finished_at=utcnow() - timedelta(days=2),
    )
    fatal = {
        "code": "too_many_dropped",
        "severity": "fatal",
        "count": 1,
        "summary": "31 % of the boxes would be dropped, and 5 % are allowed",
        "examples": [],
    }
    invalid = seeder.dataset(
        "street-signs-v2",
        status="invalid",
        **{**common, "report": {**found, "problems": [fatal, *found["problems"]], "dropped_fraction": 0.31}},
        failure={
            "class": "data",
            "code": "too_many_dropped",
            "detail": "31 % of the boxes are unusable (max_dropped_fraction is 0.05): correct them or allow more",
            "log_tail": [],
        },
    )
    seeder.dataset("digits", status="checking", started_at=utcnow())
    seeder.dataset("warehouse", status="awaiting_upload")
    return ready, invalid


def _succeeded(
    seeder: Seeder, dataset: Dataset, name: str, *, age: timedelta, best: float, seed: int, **values: Any
) -> Job:
    start = utcnow() - age + timedelta(seconds=9)
    job = seeder.job(
        name,
        dataset,
        status="succeeded",
        age=age,
        attempt=1,
        started_at=start,
        finished_at=start + timedelta(minutes=31, seconds=12),
        progress={"phase": "finishing", "epoch": EPOCHS, "epochs": EPOCHS, "step": 312, "steps": 312, "fraction": 1.0}
        | {"eta_s": 0, "images_per_s": 41.3},
        **values,
    )
    has_teacher = job.spec["teacher"] is not None
    student = evaluations(job.id, "student", EPOCHS, best, seed=seed)
    teacher = evaluations(job.id, "teacher", 10, 0.66, seed=seed + 1) if has_teacher else []
    seeder.session.add_all([*student, *teacher])
    job.results = {
        "teacher": teacher[-1].metrics if teacher else None,
        "student": {**student[-1].metrics, "epoch": EPOCHS},
        "teacher_checkpoint_id": None,
    }
    return job


def _showcase(seeder: Seeder, dataset: Dataset) -> Job:
    """Add the succeeded job that has everything."""
    labels = {"team": "lab", "purpose": "microscope"}
    job = _succeeded(seeder, dataset, "cells-mobilenet-defeat", age=timedelta(hours=2), best=0.6, seed=3, labels=labels)
    seeder.session.add_all(losses("teacher", job.id, 10, distilled=False, seed=1))
    seeder.session.add_all(losses("student", job.id, EPOCHS, distilled=True, seed=2))
    assert job.started_at is not None
    for minute, level, code, message in (
        (0, "info", "claimed", "A worker took the job (attempt 1)."),
        (0, "info", "dataset_ready", "205 images to train on, 87 to evaluate on."),
        (12, "info", "teacher_trained", "The teacher reached AP 0.629 after 10 epochs."),
        (14, "warn", "slow_input", "Reading images takes 38 % of a step; more loader processes would help."),
        (31, "info", "succeeded", "The student reached AP 0.572, 91 % of the teacher's."),
    ):
        seeder.event(job, level, code, message, job.started_at + timedelta(minutes=minute))
    seeder.artifact(job, "student-best.safetensors", "student", "application/octet-stream", b"\x08" * 1_482_116)
    seeder.artifact(job, "student-last.safetensors", "student", "application/octet-stream", b"\x09" * 1_482_116)
    seeder.artifact(job, "teacher.safetensors", "teacher", "application/octet-stream", b"\x0a" * 4_120_552)
    seeder.artifact(job, "metrics.json", "metrics", "application/json", b'{"student": {}}')
    seeder.artifact(job, "log.txt", "log", "text/plain", b"epoch 1\nepoch 2\n")
    seeder.gallery(job)
    return job


def _running(seeder: Seeder, dataset: Dataset) -> Job:
    job = seeder.job(
        "cells-mobilenet-defeat-decoupled",
        dataset,
        status="running",
        age=timedelta(minutes=24),
        attempt=1,
        started_at=utcnow() - timedelta(minutes=23, seconds=40),
        labels={"team": "lab"},
        progress={"phase": "distillation", "epoch": 7, "epochs": EPOCHS, "step": 177, "steps": 312, "fraction": 0.683}
        | {"eta_s": 612.0, "images_per_s": 41.62},
    )
    seeder.session.add_all(losses("teacher", job.id, 10, distilled=False, seed=5))
    seeder.session.add_all(losses("student", job.id, 6.8, distilled=True, seed=6))
    seeder.session.add_all(evaluations(job.id, "student", 6, 0.58, seed=7))
    seeder.session.add_all(evaluations(job.id, "teacher", 10, 0.66, seed=8))
    seeder.event(job, "info", "claimed", "A worker took the job (attempt 1).", utcnow() - timedelta(minutes=23))
    return job


def _failed(seeder: Seeder, dataset: Dataset) -> Job:
    return seeder.job(
        "cells-resnet50-large-batch",
        dataset,
        status="failed",
        age=timedelta(hours=5),
        attempt=1,
        started_at=utcnow() - timedelta(hours=4, minutes=59),
        finished_at=utcnow() - timedelta(hours=4, minutes=57, seconds=31),
        progress={"phase": "teacher", "epoch": 1, "epochs": 10, "step": 3, "steps": 260, "fraction": 0.011}
        | {"eta_s": None, "images_per_s": 12.9},
        failure={
            "class": "oom",
            "code": "out_of_memory",
            "detail": OOM,
            "log_tail": [
                "Traceback (most recent call last):",
                '  File "defeat/engine/run.py", line 52, in main',
                '    results = _entry(request["kind"])(request["spec"], request["inputs"], reporter)',
                '  File "defeat/engine/training/train.py", line 104, in _step',
                "    losses = detector(images, targets)",
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.25 GiB.",
            ],
        },
    )


def seed(database: Database, storage: Storage, tenant_id: str, *, more_jobs: int = 0) -> Seeded:
    """Add datasets and jobs of every state to a tenant, and `more_jobs` older ones; return the ids of the main ones."""
    with database.write() as session:
        seeder = Seeder(session, storage, tenant_id)
        dataset, invalid = _datasets(seeder)
        for number in range(more_jobs):
            name = f"cells-sweep-{number:02d}"
            _succeeded(
                seeder, dataset, name, age=timedelta(days=2, minutes=40 * (more_jobs - number)), best=0.5, seed=number
            )
        plain = spec(dataset.id, "cells-mobilenet-baseline", method="baseline")
        baseline = _succeeded(
            seeder,
            dataset,
            plain["name"],
            age=timedelta(hours=3),
            best=0.47,
            seed=20,
            spec=plain,
            labels={"team": "lab"},
        )
        session.add_all(losses("student", baseline.id, EPOCHS, distilled=False, seed=21))
        at_teacher = seeder.job(
            "cells-ghostnet-defeat",
            dataset,
            status="running",
            age=timedelta(minutes=11),
            attempt=2,
            started_at=utcnow() - timedelta(minutes=6),
            progress={"phase": "teacher", "epoch": 4, "epochs": 10, "step": 88, "steps": 260, "fraction": 0.142}
            | {"eta_s": 4521.0, "images_per_s": 44.02},
        )
        session.add_all(losses("teacher", at_teacher.id, 3.4, distilled=False, seed=9))
        session.add_all(evaluations(at_teacher.id, "teacher", 3, 0.66, seed=10))
        cancelled = seeder.job(
            "cells-first-try",
            dataset,
            status="cancelled",
            age=timedelta(hours=9),
            attempt=1,
            started_at=utcnow() - timedelta(hours=9),
            finished_at=utcnow() - timedelta(hours=8, minutes=58),
            progress={"phase": "teacher", "epoch": 2, "epochs": 10, "step": 31, "steps": 260, "fraction": 0.05}
            | {"eta_s": None, "images_per_s": None},
        )
        return Seeded(
            tenant_id=tenant_id,
            dataset=dataset.id,
            invalid_dataset=invalid.id,
            succeeded=_showcase(seeder, dataset).id,
            running=_running(seeder, dataset).id,
            queued=seeder.job("cells-mobilenet-seed-1", dataset, status="queued", age=timedelta(seconds=40)).id,
            failed=_failed(seeder, dataset).id,
            cancelled=cancelled.id,
            baseline=baseline.id,
            at_teacher=at_teacher.id,
        )


def main() -> None:
    """Seed the service that the environment names."""
    settings = get_settings()
    database = Database(settings.database_url)
    with database.read() as session:
        tenant_id = session.scalars(select(Tenant.id).order_by(Tenant.created_at)).first()
    if tenant_id is None:
        raise SystemExit("the database has no tenant: make a key first, `defeat admin keys --tenant TEAM --name NAME`")
    print(seed(database, Storage(settings.storage_url), tenant_id))


if __name__ == "__main__":
    main()
