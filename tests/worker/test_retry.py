"""Pausing, and what is tried again after a failure: by the real supervisor, with scripted runs."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.db import utcnow
from app.models import Job, JobEvent, JobMetric
from app.ops.sweep import sweep
from app.states import PAUSED, PAUSING, QUEUED
from tests.app.conftest import RecordingQueue
from tests.support.waiting import until
from tests.support.worker_world import FlakyDatabase, World, alive
from worker import hardware
from worker.patience import pause_s
from worker.tasks.base import Context
from worker.tasks.memory import adjusted

SUCCEED = ["finish", "succeeded", {}]
SCHEDULE = {"batch_size": 8, "accumulation": 1}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "home", max_attempts=3, retry_backoff_s=50.0)


@pytest.fixture
def each_world(tmp_path: Path, database_url: str) -> Iterator[World]:
    """A world on SQLite, and one on PostgreSQL."""
    world = World(tmp_path / "home", database_url=database_url, max_attempts=3)
    yield world
    world.database.dispose()


def progress(phase: str) -> list:
    return ["event", "progress", phase, {"fraction": 0.25, "epoch": 2, "eta_s": 60.0, "images_per_s": 9.0}]


def next_attempt(world: World, job: Job, *script: Any) -> None:
    """Work on the job as if its pause were over, with another script."""
    world.set(job, not_before=None, spec={**world.now(job).spec, "script": script})
    world.work(job)


def last_message(world: World, job: Job) -> str:
    return [event.message for event in world.all(JobEvent) if event.job_id == job.id][-1]


# ---- the machine's failures ----


def test_an_infra_failure_is_tried_again_from_the_last_checkpoint(each_world: World) -> None:
    world = each_world
    job = world.job(progress("teacher"), ["checkpoint", "a.pt", "saved"], ["kill", signal.SIGKILL])
    before = utcnow()
    world.work(job)
    row = world.now(job)
    assert (row.status, row.attempt, row.failed_attempts, row.failure) == ("queued", 1, 1, None)
    assert (row.lease_owner, row.lease_expires_at, row.enqueued_at, row.finished_at) == (None, None, None, None)
    assert timedelta(seconds=10) <= row.not_before - before < timedelta(seconds=20)
    assert world.content(row.resume_key) == b"saved"  # though it was offered in the run's last moment
    assert (row.progress["epoch"], row.progress["eta_s"], row.progress["images_per_s"]) == (2, None, None)
    assert world.codes(job) == ["claimed", "retrying"]
    told = last_message(world, job)
    assert "infra failure run_died: the run was killed by SIGKILL" in told
    assert f"next attempt starts at {row.not_before:%Y-%m-%d %H:%M:%S} UTC, from the last training checkpoint" in told
    assert told.endswith("failed attempt 1 of at most 3 in a row")
    assert world.artifacts(job) == {}

    world.work(job)
    assert world.now(job).attempt == 1  # not before its time
    next_attempt(world, job, SUCCEED)
    assert (world.now(job).status, world.now(job).attempt) == ("succeeded", 2)
    assert world.codes(job) == ["claimed", "retrying", "resumed", "succeeded"]


def test_pauses_grow_and_end() -> None:
    pauses = [pause_s(50.0, before, most_s=600.0) for before in range(5)]
    assert pauses == [50.0, 100.0, 200.0, 400.0, 600.0]
    assert pause_s(50.0, 10**6, most_s=600.0) == 600.0


def test_it_is_given_up_in_the_end(world: World) -> None:
    job = world.job(["exit", 7])
    for failed in (1, 2):
        world.work(job)
        row = world.now(job)
        assert (row.status, row.failed_attempts) == ("queued", failed)
        assert row.not_before > utcnow() + timedelta(seconds=40 * failed)
        world.set(job, not_before=None)
    world.work(job)
    row = world.now(job)
    assert (row.status, row.failure["code"]) == ("failed", "run_died")
    assert row.failure["detail"].endswith("no further attempt, because 3 in a row failed or lost their worker")
    assert world.codes(job) == ["claimed", "retrying", "resumed", "retrying", "resumed", "failed"]
    assert set(world.artifacts(job)) == {"log.txt"}


def test_a_new_checkpoint_wipes_the_slate(world: World) -> None:
    job = world.job(["checkpoint", "a.pt", "one"], ["exit", 7])
    for _ in range(4):  # more often than the limit, but further each time
        world.work(job)
        assert (world.now(job).status, world.now(job).failed_attempts) == ("queued", 1)
        world.set(job, not_before=None)


@pytest.mark.parametrize("failure_class", ["user", "data"])
def test_the_specs_and_the_datas_failures_stand(world: World, failure_class: str) -> None:
    job = world.job(["fail", failure_class, "wrong", "epochs is 0; use 1 or more"])
    world.work(job)
    row = world.now(job)
    assert (row.status, row.failure["detail"]) == ("failed", "epochs is 0; use 1 or more")


def test_what_could_not_be_stored_is_tried_again(world: World) -> None:
    world.settings.storage_patience_s = 0.0
    world.storage.match, world.storage.failures = "artifacts/", 1
    job = world.job(["artifact", "a.txt", "log", "text", {}], SUCCEED)
    world.work(job)
    assert world.codes(job) == ["claimed", "retrying"]
    assert "storage_failed" in last_message(world, job)
    next_attempt(world, job, *job.spec["script"])
    assert world.now(job).status == "succeeded"


def test_a_check_is_tried_again(world: World) -> None:
    stored = world.put("datasets/ds_1/upload-abc", b"archive")
    dataset = world.dataset(id="ds_1", upload_key="datasets/ds_1/not-there")
    world.work(dataset)
    row = world.now(dataset)
    assert (row.status, row.failed_attempts, row.failure) == ("queued", 1, None)
    assert row.not_before > utcnow()
    assert stored.key in world.storage.list("datasets/ds_1")


def test_a_job_that_is_due_is_sent_by_the_sweep(world: World) -> None:
    job = world.job(["exit", 7])
    world.work(job)
    queue = RecordingQueue()
    assert sweep(world.database, queue, world.settings) == 0
    world.set(job, not_before=utcnow() - timedelta(seconds=1))
    assert sweep(world.database, queue, world.settings) == 1
    assert queue.sent == [(Job.TASK, job.id)]


# ---- memory ----

OOM = ["fail", "oom", "out_of_memory", "8 images at a time do not fit"]


def memory_job(world: World, phase: str, *, gpus: int = 1, teacher: Any = None, **schedule: int) -> Job:
    script = [["checkpoint", "a.pt", "saved"], progress(phase), OOM]
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
    assert row.spec == job.spec  # what was asked for stays what it was
    assert last_message(world, job).endswith(f"from the last training checkpoint: {words}")
    next_attempt(world, job, ["copy_request", "request.json"], SUCCEED)
    asked = json.loads(world.content(world.artifacts(job)["request.json"].storage_key))
    assert asked["spec"] == adjusted({**job.spec, "script": asked["spec"]["script"]}, adjustments)
    assert asked["inputs"]["resume"] is not None


def test_memory_is_saved_once(world: World) -> None:
    job = memory_job(world, "distillation")
    world.work(job)
    next_attempt(world, job, *job.spec["script"])
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
    job = memory_job(world, "distillation", batch_size=18, gpus=2)  # 9 each: 2 would not divide it
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
    next_attempt(world, job, *steps, *killed_for_memory(kernel, 4))
    row = world.now(job)
    assert (row.status, row.adjustments, row.failed_attempts) == ("queued", {"schedule": {"accumulation": 2}}, 0)
    assert row.not_before < utcnow() + timedelta(seconds=20)  # at once
    assert "oom failure host_out_of_memory: the kernel killed the run because the memory" in last_message(world, job)

    next_attempt(world, job, *steps, *killed_for_memory(kernel, 5))
    row = world.now(job)
    assert (row.status, row.failure["class"], row.failure["code"]) == ("failed", "oom", "host_out_of_memory")
    told = row.failure["detail"]
    assert "give the worker more memory, or make the run need less; schedule.accumulation 2 was tried" in told
    assert told.endswith("keep fewer decoded images in memory (the worker's DEFEAT_IMAGE_MEMORY_BYTES)")


def test_a_run_that_somebody_killed_is_tried_again_as_it_was(world: World, kernel: Path) -> None:
    job = memory_job(world, "distillation")
    next_attempt(world, job, *job.spec["script"][:-1], *killed_for_memory(kernel, 3))
    row = world.now(job)
    assert (row.status, row.adjustments, row.failed_attempts) == ("queued", None, 1)
    assert "by a person or a program and not by the kernel" in last_message(world, job)


# ---- pausing ----


def test_pausing_lets_the_run_save_and_resuming_goes_on(each_world: World) -> None:
    world = each_world
    job = world.job(progress("teacher"), ["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
    row = world.now(job)
    assert (row.status, row.attempt, row.failed_attempts, row.lease_owner, row.failure) == (PAUSED, 1, 0, None, None)
    assert world.content(row.resume_key) == b"saved"
    assert (row.progress["epoch"], row.progress["eta_s"]) == (2, None)
    assert world.codes(job) == ["claimed", "paused"]
    assert world.scratch_left() == []

    world.work(job)
    assert world.now(job).attempt == 1
    world.set(job, status=QUEUED)
    next_attempt(world, job, SUCCEED)
    assert (world.now(job).status, world.now(job).attempt, world.now(job).failed_attempts) == ("succeeded", 2, 0)


def test_a_run_that_does_not_listen_is_paused_all_the_same(tmp_path: Path) -> None:
    world = World(tmp_path / "home", cancel_grace_s=0.2)
    pid = tmp_path / "pid"
    job = world.job(
        ["ignore_sigterm"], ["helper", str(pid)], ["checkpoint", "a.pt", "old"], progress("teacher"), ["sleep_forever"]
    )
    with world.working(job):
        until(lambda: world.now(job).resume_key)
        world.set(job, status=PAUSING)
    assert world.now(job).status == PAUSED
    assert world.content(world.now(job).resume_key) == b"old"
    until(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize(("status", "step"), [("succeeded", SUCCEED), ("failed", ["fail", "user", "wrong", "wrong"])])
def test_a_run_that_ends_while_it_is_paused_has_ended(world: World, status: str, step: list) -> None:
    job = world.job(progress("teacher"), ["until_told"], step)
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
    assert world.now(job).status == status


def test_a_failure_that_passes_pauses_a_job_that_was_to_be_paused(world: World) -> None:
    job = world.job(progress("teacher"), ["until_told"], ["fail", "infra", "disk_full", "no room"])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
    row = world.now(job)
    assert (row.status, row.failed_attempts, row.not_before) == (PAUSED, 1, None)
    assert "the next attempt starts when its owner resumes it" in last_message(world, job)


def test_a_pause_while_its_worker_ends(world: World) -> None:
    job = world.job(progress("teacher"), ["until_told"], ["finish", "cancelled", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
        world.stop.set()
    assert world.now(job).status == PAUSED


def test_a_cancel_overtakes_a_pause(world: World, tmp_path: Path) -> None:
    job = world.job(
        progress("teacher"), ["until_told"], ["touch", str(tmp_path / "told")], ["wait_for", str(tmp_path / "go")],
        ["finish", "cancelled", {}],
    )  # fmt: skip
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
        until((tmp_path / "told").exists)
        world.set(job, status="cancelling")
        (tmp_path / "go").touch()
    assert world.now(job).status == "cancelled"


def test_a_cancelled_job_keeps_its_checkpoint_and_may_be_tried_again(world: World) -> None:
    job = world.job(progress("teacher"), ["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status="cancelling")
    row = world.now(job)
    assert (row.status, world.content(row.resume_key)) == ("cancelled", b"saved")
    assert set(world.artifacts(job)) == {"log.txt"}
    world.set(job, status=QUEUED)
    next_attempt(world, job, SUCCEED)
    assert world.now(job).status == "succeeded"
    assert world.storage.list(f"jobs/{job.id}") == [f"jobs/{job.id}/artifacts/2/log.txt"]


# ---- handing back ----


def test_handing_back_is_no_loss(world: World) -> None:
    job = world.job(progress("teacher"), ["until_told"], ["finish", "cancelled", {}])
    for attempt in range(1, 6):  # more often than the limit
        world.stop.clear()
        with world.working(job):
            until(lambda: world.now(job).status == "running")
            world.stop.set()
        row = world.now(job)
        assert (row.status, row.attempt, row.failed_attempts) == ("queued", attempt, 0)


# ---- answers that are lost ----


class ForgetfulDatabase(FlakyDatabase):
    """Commits the next `lies` transactions and then says that it could not."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.lies = 0

    @contextmanager
    def write(self) -> Iterator[Session]:
        with super().write() as session:
            yield session
        if self.lies:
            self.lies -= 1
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))


def test_a_commit_whose_answer_is_lost_doubles_no_message(each_world: World, tmp_path: Path) -> None:
    world = each_world
    database = ForgetfulDatabase(world.settings.database_url)
    job = world.job(
        progress("teacher"),
        ["wait_for", str(tmp_path / "go")],
        ["event", "message", "info", "first", "the same text", {}],
        ["event", "message", "info", "first", "the same text", {}],
        ["checkpoint", "a.pt", "one"],
        ["event", "metrics", "student", {"step": 1, "epoch": 0.1, "values": {"loss/total": 1.0}}],
        ["wait_for", str(tmp_path / "end")],
        SUCCEED,
    )
    world.context = Context(database, world.storage, world.settings)
    world.storage.match, world.storage.failures = "resume/", 1
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        database.lies = 4
        (tmp_path / "go").touch()
        until(lambda: database.lies == 0 and "checkpoint_not_kept" in world.codes(job))
        (tmp_path / "end").touch()
    assert world.now(job).status == "succeeded"
    assert sorted(world.codes(job)) == ["checkpoint_not_kept", "claimed", "first", "first", "succeeded"]
    assert len(world.all(JobMetric)) == 1
    database.dispose()


def test_a_run_cannot_choose_a_messages_origin(world: World) -> None:
    line = '{"type": "message", "level": "info", "code": "said", "message": "x", "origin": "0"}\n'
    job = world.job(["raw", line * 3], SUCCEED)
    world.work(job)
    assert world.codes(job) == ["claimed", "said", "said", "said", "succeeded"]
    assert len({event.origin for event in world.all(JobEvent) if event.code == "said"}) == 3
