"""A row from its claim to its recorded end, by the real supervisor with scripted runs."""

import json
import signal
from datetime import timedelta
from pathlib import Path

import pytest

from app import logs
from app.db import utcnow
from app.models import Job, JobEvaluation, JobMetric
from app.states import PAUSED, PAUSING, QUEUED
from tests.support.waiting import until
from tests.support.worker_world import World, alive, log_metrics, progress

SUCCEED = ["finish", "succeeded", {}]
IN_TRAINING = ["event", "progress", "teacher", {"fraction": 0.25, "epoch": 2, "eta_s": 60.0, "images_per_s": 9.0}]


def test_a_run_that_succeeds(each_world: World) -> None:
    world = each_world
    job = world.job(
        progress("preparing", 0.0),
        log_metrics(1, 2.0),
        log_metrics(1, 1.5),
        log_metrics(2, None),
        ["event", "evaluation", "student", {"epoch": 1, "metrics": {"ap": 0.25}}],
        ["event", "message", "warn", "slow_disk", "the disk is slow", {}],
        progress("distillation", 0.5),
        ["print", "hello"],
        ["artifact", "student-best.safetensors", "student", "weights", {"epoch": 3}],
        ["artifact", "gallery/0.jpg", "gallery", "image", {}],
        ["finish", "succeeded", {"student": {"ap": 0.25, "epoch": 3}}],
        history_swept_at=utcnow(),  # of an earlier end
    )

    world.work(job)

    row = world.now(job)
    assert (row.status, row.history_swept_at) == ("succeeded", None)
    assert (row.failure, row.lease_owner, row.lease_expires_at, row.resume_key) == (None, None, None, None)
    assert row.started_at <= row.finished_at
    assert row.results == {"student": {"ap": 0.25, "epoch": 3}, "teacher_checkpoint_id": None}
    assert row.progress["phase"] == "distillation"
    assert set(row.progress) == {
        "phase", "epoch", "epochs", "step", "steps", "fraction", "eta_s", "images_per_s",
    }  # fmt: skip
    assert [(m.step, m.epoch, m.values) for m in world.all(JobMetric)] == [
        (1, 0.1, {"loss/total": 1.5}),
        (2, 0.2, {"loss/total": None}),
    ]
    assert [(e.subject, e.epoch, e.metrics) for e in world.all(JobEvaluation)] == [("student", 1, {"ap": 0.25})]
    assert world.codes(job) == ["claimed", "slow_disk", "succeeded"]
    artifacts = world.artifacts(job)
    assert set(artifacts) == {"student-best.safetensors", "gallery/0.jpg", "log.txt"}
    best = artifacts["student-best.safetensors"]
    assert (best.kind, best.details, best.size_bytes) == ("student", {"epoch": 3}, 7)
    assert world.content(best.storage_key) == b"weights"
    assert world.content(artifacts["log.txt"].storage_key).endswith(b"\nhello\n")
    assert world.scratch_left() == []


def test_the_run_gets_its_request_and_no_secrets(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL", "DEFEAT_SECRET", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    job = world.job(
        ["environment", "artifacts/environment.json"],
        ["artifact", "x", "log", "", {}],
        ["event", "artifact", "environment.json", {"kind": "log", "content_type": "application/json"}],
        ["event", "artifact", "../run.json", {"kind": "log", "content_type": "application/json"}],
        ["finish", "succeeded", {}],
    )
    world.work(job)
    assert world.now(job).failure["code"] == "bad_result"  # a name outside artifacts/

    job = world.job(*[step for step in job.spec["script"] if "../run.json" not in step])
    world.work(job)
    environment = json.loads(world.content(world.artifacts(job)["environment.json"].storage_key))
    assert "secret" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_run_that_fails_says_why_and_leaves_its_log(world: World) -> None:
    lines = "\n".join(f"line {number}" for number in range(30))
    job = world.job(
        ["print", lines],
        ["artifact", "student-last.safetensors", "student", "weights", {}],
        ["fail", "user", "bad_spec", "epochs is 0; use 1 or more"],
    )

    world.work(job)

    row = world.now(job)
    assert row.status == "failed"
    assert row.failure == {
        "class": "user",
        "code": "bad_spec",
        "detail": "epochs is 0; use 1 or more",
        "log_tail": [f"line {number}" for number in range(10, 30)],
    }
    assert set(world.artifacts(job)) == {"student-last.safetensors", "log.txt"}
    assert world.codes(job) == ["claimed", "failed"]


@pytest.mark.parametrize(
    ("step", "detail"),
    [
        (
            ["kill", signal.SIGKILL],
            "the run was killed by SIGKILL and left no result; the machine was probably out of memory",
        ),
        (["kill", signal.SIGSEGV], "the run was killed by SIGSEGV and left no result"),
        (["exit", 7], "the run ended with exit code 7 and left no result"),
    ],
)
def test_a_run_that_dies(world: World, monkeypatch: pytest.MonkeyPatch, step: list, detail: str) -> None:
    monkeypatch.setattr("worker.process.memory_kills", lambda: None)  # the kernel reports no reason
    job = world.job(["print", "last words"], log_metrics(1, 1.0), ["raw", '{"type": "progr'], step)
    world.work(job)
    row = world.now(job)
    assert row.failure["log_tail"][0] == "last words"
    assert row.failure | {"log_tail": []} == {"class": "infra", "code": "run_died", "detail": detail, "log_tail": []}
    assert len(world.all(JobMetric)) == 1  # the incomplete line is not an event
    assert world.codes(job) == ["claimed", "failed"]


def test_a_run_that_somebody_else_ended(world: World) -> None:
    job = world.job(["finish", "cancelled", {}])
    world.work(job)
    assert world.now(job).failure["code"] == "run_terminated"


def test_helpers_of_a_run_end_with_it(world: World, tmp_path: Path) -> None:
    job = world.job(["helper", str(tmp_path / "pid")], ["finish", "succeeded", {}])
    world.work(job)
    assert world.now(job).status == "succeeded"
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_cancelling_lets_the_run_save(world: World) -> None:
    job = world.job(
        progress("teacher", 0.1),
        ["until_told"],
        ["artifact", "student-last.safetensors", "student", "saved", {}],
        ["finish", "cancelled", {}],
    )
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status="cancelling")
    row = world.now(job)
    assert (row.status, row.failure) == ("cancelled", None)
    assert set(world.artifacts(job)) == {"student-last.safetensors", "log.txt"}
    assert world.codes(job) == ["claimed", "cancelled"]


def test_cancelling_kills_a_run_that_does_not_listen(tmp_path: Path) -> None:
    world = World(tmp_path / "home", cancel_grace_s=0.2)
    job = world.job(["ignore_sigterm"], progress("teacher", 0.1), ["sleep_forever"])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status="cancelling")
    assert (world.now(job).status, world.now(job).failure) == ("cancelled", None)


def test_progress_does_not_undo_a_cancel(world: World, tmp_path: Path) -> None:
    job = world.job(["wait_for", str(tmp_path / "go")], progress("teacher", 0.1), ["finish", "succeeded", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "preparing")
        world.set(job, status="cancelling")
        (tmp_path / "go").touch()
    assert world.now(job).status in {"cancelled", "succeeded"}


def test_a_job_whose_worker_died_while_cancelling_is_cancelled(world: World) -> None:
    expired = utcnow() - timedelta(seconds=1)
    job = world.job(["exit", 1], status="cancelling", attempt=1, lease_owner="dead", lease_expires_at=expired)
    world.work(job)
    assert (world.now(job).status, world.now(job).attempt) == ("cancelled", 2)


def test_a_lost_lease_ends_the_run_and_writes_nothing(each_world: World, tmp_path: Path) -> None:
    world = each_world
    pid = tmp_path / "pid"
    job = world.job(
        ["helper", str(pid)],
        progress("teacher", 0.1),
        ["wait_for", str(tmp_path / "go")],
        progress("teacher", 0.9),
        ["sleep_forever"],
    )
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, attempt=2, lease_owner="another")
        (tmp_path / "go").touch()
    row = world.now(job)
    assert (row.status, row.attempt, row.lease_owner, row.progress["fraction"]) == ("running", 2, "another", 0.1)
    assert world.codes(job) == ["claimed"]
    assert world.artifacts(job) == {}
    assert world.scratch_left() == []
    until(lambda: not alive(int(pid.read_text())))


def test_a_row_that_is_held_is_left_alone(world: World) -> None:
    later = utcnow() + timedelta(minutes=1)
    job = world.job(["exit", 1], status="running", attempt=1, lease_owner="another", lease_expires_at=later)
    world.work(job)
    assert (world.now(job).status, world.now(job).attempt) == ("running", 1)


def test_a_worker_that_must_end_hands_the_job_back(world: World) -> None:
    job = world.job(
        progress("teacher", 0.1), ["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}]
    )
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.stop.set()
    row = world.now(job)
    assert (row.status, row.attempt, row.lease_owner, row.lease_expires_at) == ("queued", 1, None, None)
    assert (row.enqueued_at, row.finished_at) == (None, None)
    assert world.content(row.resume_key) == b"saved"
    assert world.codes(job) == ["claimed", "interrupted"]
    assert world.scratch_left() == []


def test_a_cancelled_job_is_not_handed_back(world: World) -> None:
    job = world.job(progress("teacher", 0.1), ["until_told"], ["finish", "cancelled", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status="cancelling")
        world.stop.set()
    assert world.now(job).status == "cancelled"


def test_a_mistake_in_the_worker_is_recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("worker.tasks.jobs.JobHandler.upload", _broken)
    job: Job = world.job(["finish", "succeeded", {}])
    with pytest.raises(RuntimeError, match="boom"):
        world.work(job)
    assert world.now(job).failure["code"] == "worker_error"


def test_the_requests_id_reaches_the_run_and_the_log(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO")
    copied = world.home / "run.json"
    job = world.job(["copy", "run.json", str(copied)], ["finish", "succeeded", {}], request_id="my-request-1")
    world.work(job)
    assert json.loads(copied.read_text())["request_id"] == "my-request-1"
    claimed = next(line for line in capsys.readouterr().err.splitlines() if '"claimed"' in line)
    assert json.loads(claimed)["request_id"] == "my-request-1"


# ---- pausing and handing back ----


def test_pausing_lets_the_run_save_and_resuming_goes_on(each_world: World) -> None:
    world = each_world
    job = world.job(IN_TRAINING, ["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}])
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
    world.next_attempt(job, SUCCEED)
    assert (world.now(job).status, world.now(job).attempt, world.now(job).failed_attempts) == ("succeeded", 2, 0)


def test_a_run_that_does_not_listen_is_paused_all_the_same(tmp_path: Path) -> None:
    world = World(tmp_path / "home", cancel_grace_s=0.2)
    pid = tmp_path / "pid"
    job = world.job(
        ["ignore_sigterm"], ["helper", str(pid)], ["checkpoint", "a.pt", "old"], IN_TRAINING, ["sleep_forever"]
    )
    with world.working(job):
        until(lambda: world.now(job).resume_key)
        world.set(job, status=PAUSING)
    assert world.now(job).status == PAUSED
    assert world.content(world.now(job).resume_key) == b"old"
    until(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize(("status", "step"), [("succeeded", SUCCEED), ("failed", ["fail", "user", "wrong", "wrong"])])
def test_a_run_that_ends_while_it_is_paused_has_ended(world: World, status: str, step: list) -> None:
    job = world.job(IN_TRAINING, ["until_told"], step)
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
    assert world.now(job).status == status


def test_a_pause_while_its_worker_ends(world: World) -> None:
    job = world.job(IN_TRAINING, ["until_told"], ["finish", "cancelled", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
        world.stop.set()
    assert world.now(job).status == PAUSED


def test_a_cancel_overtakes_a_pause(world: World, tmp_path: Path) -> None:
    job = world.job(
        IN_TRAINING, ["until_told"], ["touch", str(tmp_path / "told")], ["wait_for", str(tmp_path / "go")],
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
    job = world.job(IN_TRAINING, ["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status="cancelling")
    row = world.now(job)
    assert (row.status, world.content(row.resume_key)) == ("cancelled", b"saved")
    assert set(world.artifacts(job)) == {"log.txt"}
    world.set(job, status=QUEUED)
    world.next_attempt(job, SUCCEED)
    assert world.now(job).status == "succeeded"
    assert world.storage.list(f"jobs/{job.id}") == [f"jobs/{job.id}/artifacts/2/log.txt"]


def test_handing_back_is_no_loss(world: World) -> None:
    job = world.job(IN_TRAINING, ["until_told"], ["finish", "cancelled", {}])
    for attempt in range(1, 6):  # more often than the limit
        world.stop.clear()
        with world.working(job):
            until(lambda: world.now(job).status == "running")
            world.stop.set()
        row = world.now(job)
        assert (row.status, row.attempt, row.failed_attempts) == ("queued", attempt, 0)
