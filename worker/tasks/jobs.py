"""The handler for jobs: a distillation run, its history, its artifacts and checkpoints."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db import now, utcnow
from app.ids import new_id
from app.models import Artifact, Base, Checkpoint, Dataset, Job, JobEvaluation, JobEvent, JobMetric
from app.queue import leases
from app.states import CANCELLED, FAILED, PREPARING, READY, RUNNING, SUCCEEDED
from app.storage import Stored
from defeat.engine.events import Evaluation, Metrics, Progress, ResultArtifact
from defeat.engine.report import RunError
from worker.process import HOST_OUT_OF_MEMORY
from worker.rundir import RecordedEvent, RecordedMessage, RunDirectory
from worker.tasks import memory
from worker.tasks.base import Context, Handler, Outcome, Request
from worker.tasks.cache import DatasetCache

_LOG = ResultArtifact(name="log.txt", kind="log", content_type="text/plain; charset=utf-8", details={})
_TEACHER = "teacher.safetensors"
_TEACHER_COPY = "teacher as a checkpoint"  # no artifact can have a name with spaces
_STATUS = {"succeeded": SUCCEEDED, "failed": FAILED, "cancelled": CANCELLED}
_ENDINGS = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}


class JobHandler(Handler[Job]):
    """Works on job rows."""

    model: ClassVar = Job

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._cache = DatasetCache(self.settings.scratch / "datasets", self.storage)

    # ---- before the run ----

    def prepare(self, row: Job, directory: Path, cleanup: ExitStack) -> Request:
        """Fetch the dataset, the checkpoints, and the training checkpoint of an earlier attempt."""
        content_hash, key = self._dataset(row)
        inputs: dict[str, str | int | None] = {
            "dataset": str(self._cache.use(content_hash, key, cleanup)),
            "resume": None,
            "device": self.settings.device,
            "image_memory_bytes": self.settings.image_memory_bytes,
        }
        spec = memory.adjusted(row.spec, row.adjustments)
        for name, checkpoint_id in initial_checkpoints(spec).items():
            path = directory / f"{name}.safetensors"
            inputs[name] = checkpoint_id and self.fetch(self._checkpoint_key(row, checkpoint_id), path, checkpoint_id)
        if row.resume_key is not None:
            inputs["resume"] = self.fetch(row.resume_key, directory / "resume.pt", "the earlier attempt's checkpoint")
        return Request("distill", spec, inputs)

    def _dataset(self, row: Job) -> tuple[str, str]:
        mine = (Dataset.id == row.dataset_id, Dataset.tenant_id == row.tenant_id, Dataset.status == READY)
        with self.database.read() as session:
            found = session.execute(select(Dataset.content_hash, Dataset.storage_key).where(*mine)).one_or_none()
        if found is None or found.content_hash is None or found.storage_key is None:
            raise RunError("user", "dataset_not_ready", f"dataset {row.dataset_id} was deleted or is no longer ready")
        return found.content_hash, found.storage_key

    def _checkpoint_key(self, row: Job, checkpoint_id: str) -> str:
        mine = (Checkpoint.id == checkpoint_id, Checkpoint.tenant_id == row.tenant_id, Checkpoint.status == READY)
        with self.database.read() as session:
            key = session.scalar(select(Checkpoint.storage_key).where(*mine))
        if key is None:
            raise RunError(
                "user", "checkpoint_not_ready", f"checkpoint {checkpoint_id} was deleted or is no longer ready"
            )
        return key

    # ---- during the run ----

    def record(self, session: Session, row: Job, events: Sequence[RecordedEvent]) -> None:
        """Write messages, metrics and evaluations, and the newest progress."""
        for event in events:
            if isinstance(event, RecordedMessage):
                _write_message(session, row, event)
        _upsert(session, JobMetric, [_metric(row, event) for event in events if isinstance(event, Metrics)])
        _upsert(session, JobEvaluation, [_evaluation(row, event) for event in events if isinstance(event, Evaluation)])
        if progress := [event for event in events if isinstance(event, Progress)]:
            members = {name: value for name, value in vars(progress[-1]).items() if name not in ("type", "time")}
            values: dict[str, Any] = {"progress": members}
            if row.status == PREPARING and any(event.phase != "preparing" for event in progress):
                values["status"] = RUNNING
            leases.fenced(session, row, **values)

    def checkpoint_key(self, row: Job, number: int) -> str:
        """Return the object key for the attempt's training checkpoint of this number."""
        return f"jobs/{row.id}/resume/{row.attempt}-{number}.pt"

    def keep_checkpoint(self, session: Session, row: Job, key: str) -> str | None:
        """Let the next attempt resume from `key`. The job has advanced, so its failed attempts no longer count."""
        # The same key is recorded twice if the answer to a commit was lost; then it replaces nothing.
        replaced = None if row.resume_key == key else row.resume_key
        leases.fenced(session, row, resume_key=key, failed_attempts=0)
        return replaced

    # ---- between two runs ----

    def reduce_memory(self, row: Job) -> tuple[dict[str, Any], str] | None:
        """Let the next attempt process its batches in smaller parts; after one such attempt the user must act."""
        changes = None if row.adjustments else memory.reduced(row.spec, _phase(row))
        return None if changes is None else ({"adjustments": changes}, f"with {memory.describe(changes)}")

    def memory_advice(self, row: Job, code: str) -> str:
        """Return what the service tried, what to change in the spec, and how the machine could use less memory."""
        advice = memory.advice(memory.adjusted(row.spec, row.adjustments), _phase(row))
        if code == HOST_OUT_OF_MEMORY:
            advice += "; or keep fewer decoded images in memory (the worker's DEFEAT_IMAGE_MEMORY_BYTES)"
        tried = f"{memory.describe(row.adjustments)} was tried and does not fit either; " if row.adjustments else ""
        return tried + advice

    def resume_point(self, row: Job) -> str:
        """Return in words where another attempt begins."""
        return "from the beginning" if row.resume_key is None else "from the last training checkpoint"

    def idle_values(self, row: Job) -> dict[str, Any]:
        """Clear the throughput and the remaining time of the run that has ended."""
        if row.progress is None:
            return {}
        return {"progress": {**row.progress, "eta_s": None, "images_per_s": None}}

    # ---- after the run ----

    def complete(self, outcome: Outcome, directory: RunDirectory) -> Outcome:
        """Add the log to the artifacts."""
        if not directory.log.is_file():
            return outcome
        others = [artifact for artifact in outcome.artifacts if artifact.name != _LOG.name]
        return replace(outcome, artifacts=[*others, _LOG])

    def upload(self, row: Job, outcome: Outcome, directory: RunDirectory) -> dict[str, Stored]:
        """Store every artifact, and a trained teacher a second time as the weights of its checkpoint."""
        uploaded: dict[str, Stored] = {}
        for artifact in outcome.artifacts:
            path = directory.log if artifact.name == _LOG.name else directory.file(f"artifacts/{artifact.name}")
            key = f"jobs/{row.id}/artifacts/{row.attempt}/{artifact.name}"
            uploaded[artifact.name] = self.storage.put_file(key, path)
        if _trained_teacher(row, outcome) is not None:
            path = directory.file(f"artifacts/{_TEACHER}")
            key = f"checkpoints/{teacher_checkpoint_id(row)}/weights-{row.attempt}.safetensors"
            uploaded[_TEACHER_COPY] = self.storage.put_file(key, path)
        return uploaded

    def finish(self, session: Session, row: Job, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Record the end, the artifacts, and the trained teacher as a checkpoint."""
        results = None
        if outcome.status == "succeeded":
            teacher = self._add_teacher(session, row, outcome, uploaded)
            results = {**outcome.results, "teacher_checkpoint_id": teacher}
        # Those of an attempt that ended before the owner requested a retry.
        session.execute(delete(Artifact).where(Artifact.job_id == row.id))
        for artifact in outcome.artifacts:
            if artifact.name in uploaded:
                session.add(_artifact(row, artifact, uploaded[artifact.name]))
        _write_message(session, row, _end_message(outcome))
        kept = None if outcome.status == "succeeded" else row.resume_key
        status = _STATUS[outcome.status]
        values = {"results": results, "failure": outcome.failure, "resume_key": kept, "history_swept_at": None}
        leases.finish(session, row, status=status, **values)

    def _add_teacher(self, session: Session, row: Job, outcome: Outcome, uploaded: Mapping[str, Stored]) -> str | None:
        artifact = _trained_teacher(row, outcome)
        if artifact is None:
            return None
        stored = uploaded[_TEACHER_COPY]
        checkpoint = Checkpoint(
            id=teacher_checkpoint_id(row),
            tenant_id=row.tenant_id,
            name=f"{row.name[:190]} teacher",
            status=READY,
            detector=artifact.details.get("detector"),
            classes=artifact.details.get("classes"),
            coverage=artifact.details.get("coverage"),
            storage_key=stored.key,
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            source_job_id=row.id,
            started_at=row.started_at,
            finished_at=now(session),
        )
        session.add(checkpoint)
        return checkpoint.id

    def clean_up(self, row: Job, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Delete the artifacts of earlier attempts, and the training checkpoints of a job that succeeded.

        A job that did not succeed keeps its training checkpoints for a retry. That retry may already have begun, so
        objects of newer attempts stay.
        """
        keep = {stored.key for stored in uploaded.values()}
        succeeded = outcome.status == "succeeded"
        for folder in (f"jobs/{row.id}", f"checkpoints/{teacher_checkpoint_id(row)}"):
            for key in self.storage.list(folder):
                if key not in keep and (succeeded or _attempt_of(row, key) <= row.attempt):
                    self.storage.delete(key)


def initial_checkpoints(spec: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the ids of the checkpoints that a resolved job spec names, by the name of the run's input."""
    teacher, student = spec["teacher"] or {}, spec["student"]
    from_checkpoint = teacher.get("source") == "checkpoint"
    return {
        "teacher": teacher["id"] if from_checkpoint else None,
        "teacher_initial": None if from_checkpoint else _checkpoint_id(teacher.get("initial_weights")),
        "student": _checkpoint_id(student.get("initial_weights")),
    }


def _checkpoint_id(initial_weights: str | None) -> str | None:
    return initial_weights if (initial_weights or "").startswith("ckpt_") else None


def teacher_checkpoint_id(row: Job) -> str:
    """Return the id of the checkpoint for the job's trained teacher: the same in every attempt."""
    return "ckpt_" + row.id.removeprefix("job_")


def _trained_teacher(row: Job, outcome: Outcome) -> ResultArtifact | None:
    if outcome.status != "succeeded" or (row.spec["teacher"] or {}).get("source") != "train":
        return None
    return next((artifact for artifact in outcome.artifacts if artifact.name == _TEACHER), None)


def _attempt_of(row: Job, key: str) -> float:
    """Return the attempt that stored the artifact `key`; infinity for any other object."""
    found = re.match(rf"jobs/{row.id}/artifacts/(\d+)/", key)
    return int(found[1]) if found else math.inf


def _artifact(row: Job, artifact: ResultArtifact, stored: Stored) -> Artifact:
    return Artifact(
        id=new_id("art"),
        job_id=row.id,
        name=artifact.name,
        kind=artifact.kind,
        content_type=artifact.content_type,
        storage_key=stored.key,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        details=artifact.details,
    )


def _end_message(outcome: Outcome) -> RecordedMessage:
    if outcome.failure is not None:
        text = f"{outcome.failure['class']} failure {outcome.failure['code']}: {outcome.failure['detail']}"
        return RecordedMessage(level="error", code="failed", message=text[:20_000])
    return RecordedMessage(level="info", code=outcome.status, message=f"the job {_ENDINGS[outcome.status]}")


def _phase(row: Job) -> str | None:
    return (row.progress or {}).get("phase")


def _write_message(session: Session, row: Job, message: RecordedMessage) -> None:
    """Write a message, unless it was written before, by a commit whose answer was lost."""
    values = {
        "job_id": row.id,
        "level": message.level,
        "code": message.code,
        "message": message.message,
        "origin": message.origin and f"{row.attempt}: {message.origin}",
        "created_at": message.time or utcnow(),
    }
    # One by one, so that the ids have the order of the events.
    session.execute(_insert(session, JobEvent).on_conflict_do_nothing().values(values))


def _metric(row: Job, event: Metrics) -> dict[str, Any]:
    return {
        "job_id": row.id,
        "subject": event.subject,
        "step": event.step,
        "epoch": event.epoch,
        "values": event.values,
    }


def _evaluation(row: Job, event: Evaluation) -> dict[str, Any]:
    return {"job_id": row.id, "subject": event.subject, "epoch": event.epoch, "metrics": event.metrics}


def _insert(session: Session, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    return insert(model.__table__)  # type: ignore[arg-type]  # typed as any FROM clause, but it is a table


def _upsert(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows, or replace those with the same key: another attempt repeats steps of the one before."""
    if not rows:
        return
    statement = _insert(session, model)
    key = [column.name for column in model.__table__.primary_key]
    others = {column.name: statement.excluded[column.name] for column in model.__table__.c if column.name not in key}
    session.connection().execute(statement.on_conflict_do_update(index_elements=key, set_=others), rows)
