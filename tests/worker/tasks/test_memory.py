"""What another attempt changes after memory was exhausted."""

import json
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.db import utcnow
from app.models import Job
from tests.support.worker_world import World
from worker import hardware
from worker.tasks.memory import adjusted

SUCCEED = ["finish", "succeeded", {}]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "home", max_attempts=3, retry_backoff_s=50.0)


SCHEDULE = {"batch_size": 8, "accumulation": 1}


OOM = ["fail", "oom", "out_of_memory", "8 images at a time do not fit"]


def memory_job(world: World, phase: str, *, gpus: int = 1, teacher: Any = None, **schedule: int) -> Job:
    script = [["checkpoint", "a.pt", "saved"], ["event", "progress", phase, {"fraction": 0.25}], OOM]
    spec = {
        "teacher": teacher,
        "student": {"initial_weights": "random"},
        "schedule": SCHEDULE | schedule,
        "evaluation": {"batch_size": 4},
        "resources": {"gpus": gpus},
        "script": script,
    }
    return world.job(spec=spec)


@pytest.mark.parametrize(
    ("phase", "adjustments", "words"),
    [
        ("distillation", {"schedule": {"accumulation": 2}}, "with schedule.accumulation 2"),
        ("teacher", {"teacher": {"schedule": {"accumulation": 6}}}, "with teacher.schedule.accumulation 6"),
        ("evaluation", {"evaluation": {"batch_size": 2}}, "with evaluation.batch_size 2"),
    ],
)
def test_memory_is_saved_where_it_ran_out(world: World, phase: str, adjustments: Any, words: str) -> None:
    teacher = {"source": "train", "initial_weights": "random", "schedule": {"batch_size": 12, "accumulation": 3}}
    job = memory_job(world, phase, teacher=teacher)
    world.work(job)
    row = world.now(job)
    assert (row.status, row.adjustments, row.failed_attempts) == ("queued", adjustments, 0)
    assert row.spec == job.spec  # the requested spec does not change
    assert world.last_message(job).endswith(f"from the last training checkpoint: {words}")
    world.next_attempt(job, ["copy_request", "request.json"], SUCCEED)
    asked = json.loads(world.content(world.artifacts(job)["request.json"].storage_key))
    assert asked["spec"] == adjusted({**job.spec, "script": asked["spec"]["script"]}, adjustments)
    assert asked["inputs"]["resume"] is not None


def test_memory_is_saved_once(world: World) -> None:
    job = memory_job(world, "distillation")
    world.work(job)
    world.next_attempt(job, *job.spec["script"])
    row = world.now(job)
    assert (row.status, row.failure["class"], row.adjustments) == ("failed", "oom", {"schedule": {"accumulation": 2}})
    assert row.failure["detail"] == (
        "8 images at a time do not fit; schedule.accumulation 2 was tried and does not fit either; this happened in "
        "the training of the student: set schedule.accumulation to one of 4, 8, or lower the detectors' min_size and "
        "max_size, or use smaller detectors"
    )


@pytest.mark.parametrize(
    ("phase", "gpus", "schedule", "hint"),
    [
        ("distillation", 4, {"accumulation": 2}, "the training of the student, with one image at a time: lower"),
        ("preparing", 1, {}, "lower the detectors' min_size"),
    ],
)
def test_memory_that_cannot_be_saved(world: World, phase: str, gpus: int, schedule: Any, hint: str) -> None:
    job = memory_job(world, phase, gpus=gpus, **schedule)
    world.work(job)
    row = world.now(job)
    assert (row.status, row.adjustments) == ("failed", None)
    assert hint in row.failure["detail"]


def test_parts_of_a_batch_are_equal(world: World) -> None:
    job = memory_job(world, "distillation", batch_size=18, gpus=2)  # 9 each, which 2 does not divide
    world.work(job)
    assert world.now(job).adjustments == {"schedule": {"accumulation": 3}}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's count of kills for memory, in a file that a run's script may write."""
    counter = tmp_path / "cgroup" / "memory.events"
    counter.parent.mkdir()
    counter.write_text("oom_kill 3\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(hardware, "_CGROUPS", counter.parent)
    return counter


def killed_for_memory(kernel: Path, kills: int) -> list:
    return [["write", str(kernel), f"oom_kill {kills}\n"], ["kill", signal.SIGKILL]]


def test_a_run_that_the_kernel_killed_for_memory_takes_less(world: World, kernel: Path) -> None:
    job = memory_job(world, "distillation")
    steps = job.spec["script"][:-1]
    world.next_attempt(job, *steps, *killed_for_memory(kernel, 4))
    row = world.now(job)
    assert (row.status, row.adjustments, row.failed_attempts) == ("queued", {"schedule": {"accumulation": 2}}, 0)
    assert row.not_before < utcnow() + timedelta(seconds=20)  # at once
    assert "oom failure host_out_of_memory: the kernel killed the run because the memory" in world.last_message(job)

    world.next_attempt(job, *steps, *killed_for_memory(kernel, 5))
    row = world.now(job)
    assert (row.status, row.failure["class"], row.failure["code"]) == ("failed", "oom", "host_out_of_memory")
    told = row.failure["detail"]
    assert "give the worker more memory, or make the run need less; schedule.accumulation 2 was tried" in told
    assert told.endswith("keep fewer decoded images in memory (the worker's DEFEAT_IMAGE_MEMORY_BYTES)")


def test_a_run_that_somebody_killed_is_tried_again_as_it_was(world: World, kernel: Path) -> None:
    job = memory_job(world, "distillation")
    world.next_attempt(job, *job.spec["script"][:-1], *killed_for_memory(kernel, 3))
    row = world.now(job)
    assert (row.status, row.adjustments, row.failed_attempts) == ("queued", None, 1)
    assert "by a person or a program and not by the kernel" in world.last_message(job)
