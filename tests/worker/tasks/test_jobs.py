"""The request for a job's run, and what the job keeps of its results."""

from pathlib import Path
from typing import Any

import pytest

from app.models import Checkpoint, Tenant
from defeat.engine.report import RunError
from tests.support.worker_world import World
from tests.worker.tasks.conftest import prepare


def ready_checkpoint(world: World, data: bytes, **values: Any) -> Checkpoint:
    stored = world.put(f"checkpoints/ckpt_{data.decode()}/weights-1.safetensors", data)
    return world.checkpoint(id=f"ckpt_{data.decode()}", status="ready", storage_key=stored.key, **values)


def test_a_jobs_inputs(world: World, tmp_path: Path) -> None:
    teacher, student = ready_checkpoint(world, b"teacher"), ready_checkpoint(world, b"student")
    resume = world.put("jobs/x/resume/1-1.pt", b"resume")
    spec = {"teacher": {"source": "checkpoint", "id": teacher.id}, "student": {"initial_weights": student.id}}
    job = world.job(spec=spec, resume_key=resume.key, dataset_id=world.ready_dataset(b'{"a": 1}').id)

    request = prepare(world, job, tmp_path / "run")

    assert request.kind == "distill"
    assert request.spec == spec
    inputs = request.inputs
    assert (Path(inputs["dataset"]) / "dataset.json").read_text() == '{"a": 1}'
    contents = {name: Path(inputs[name]).read_bytes() for name in ("teacher", "student", "resume")}
    assert contents == {"teacher": b"teacher", "student": b"student", "resume": b"resume"}
    assert (inputs["teacher_initial"], inputs["device"], inputs["image_memory_bytes"]) == (None, "auto", None)


@pytest.mark.parametrize(
    "teacher", [None, {"source": "pretrained"}, {"source": "train", "initial_weights": "imagenet"}]
)
def test_a_job_without_checkpoints(world: World, tmp_path: Path, teacher: Any) -> None:
    inputs = prepare(world, world.job(teacher=teacher), tmp_path / "run").inputs
    assert [inputs[name] for name in ("teacher", "student", "teacher_initial", "resume")] == [None] * 4


def test_a_trained_teacher_may_begin_with_a_checkpoint(world: World, tmp_path: Path) -> None:
    initial = ready_checkpoint(world, b"initial")
    job = world.job(teacher={"source": "train", "initial_weights": initial.id})
    inputs = prepare(world, job, tmp_path / "run").inputs
    assert Path(inputs["teacher_initial"]).read_bytes() == b"initial"
    assert inputs["teacher"] is None


def test_another_tenants_checkpoint_is_not_there(world: World, tmp_path: Path) -> None:
    world.add(Tenant(id="other", name="other"))
    theirs = ready_checkpoint(world, b"theirs", tenant_id="other")
    job = world.job(teacher={"source": "checkpoint", "id": theirs.id})
    with pytest.raises(RunError, match="ckpt_theirs was deleted"):
        prepare(world, job, tmp_path / "run")


def test_a_dataset_that_is_gone(world: World) -> None:
    dataset = world.ready_dataset()
    job = world.job(["finish", "succeeded", {}], dataset_id=dataset.id)
    world.storage.delete(dataset.storage_key)
    world.work(job)
    failure = world.now(job).failure
    assert (failure["class"], failure["code"]) == ("infra", "object_missing")


def test_a_trained_teacher_becomes_a_checkpoint(world: World) -> None:
    details = {"detector": {"architecture": "faster_rcnn"}, "classes": ["RBC"], "coverage": {"loaded": 3, "total": 3}}
    job = world.job(
        ["artifact", "teacher.safetensors", "teacher", "weights", details],
        ["finish", "succeeded", {"teacher": {"ap": 0.5}}],
        teacher={"source": "train"},
    )

    world.work(job)

    [checkpoint] = world.all(Checkpoint)
    assert world.now(job).results == {"teacher": {"ap": 0.5}, "teacher_checkpoint_id": checkpoint.id}
    assert (checkpoint.status, checkpoint.name, checkpoint.source_job_id) == ("ready", "small teacher", job.id)
    assert (checkpoint.detector, checkpoint.classes) == (details["detector"], ["RBC"])
    assert checkpoint.coverage == details["coverage"]
    assert checkpoint.tenant_id == job.tenant_id
    assert world.content(checkpoint.storage_key) == b"weights"
    assert checkpoint.sha256 == world.artifacts(job)["teacher.safetensors"].sha256


def test_a_teacher_of_a_job_that_failed_is_no_checkpoint(world: World) -> None:
    steps = [["artifact", "teacher.safetensors", "teacher", "weights", {}], ["fail", "oom", "out_of_memory", "too big"]]
    job = world.job(*steps, teacher={"source": "train"})
    world.work(job)
    assert world.all(Checkpoint) == []
    assert "teacher.safetensors" in world.artifacts(job)


def test_the_end_of_one_attempt_leaves_the_next_ones_files_alone(world: World) -> None:
    """The owner of a failed job may retry it before its old worker has cleaned up."""
    job = world.job(["fail", "user", "wrong", "wrong"], attempt=1)
    keys = [f"jobs/{job.id}/{name}" for name in ("artifacts/1/a", "artifacts/3/a", "resume/1-1.pt", "resume/3-1.pt")]
    for key in keys:
        world.put(key, b"x")
    world.work(job)
    assert world.now(job).attempt == 2
    assert world.storage.list(f"jobs/{job.id}") == sorted([f"jobs/{job.id}/artifacts/2/log.txt", *keys[1:]])
