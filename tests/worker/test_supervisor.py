import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from app import logs
from app.db import utcnow
from app.models import Job, JobEvaluation, JobEvent, JobMetric
from tests.support.waiting import until
from tests.support.worker_world import World, alive


@pytest.fixture
def world(tmp_path: Path, storage_url: str) -> World:
    return World(tmp_path / "home", storage_url=storage_url)


@pytest.fixture
def each_world(tmp_path: Path, database_url: str, storage_url: str) -> Iterator[World]:
    """A world on SQLite, and one on PostgreSQL."""
    world = World(tmp_path / "home", database_url=database_url, storage_url=storage_url)
    yield world
    world.database.dispose()


def metrics(step: int, loss: float | None) -> list:
    return ["event", "metrics", "student", {"step": step, "epoch": step / 10, "values": {"loss/total": loss}}]


def progress(phase: str, fraction: float) -> list:
    return ["event", "progress", phase, {"fraction": fraction}]


def test_a_run_that_succeeds(each_world: World) -> None:
    world = each_world
    job = world.job(
        progress("preparing", 0.0),
        metrics(1, 2.0),
        metrics(1, 1.5),
        metrics(2, None),
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
    assert world.now(job).failure["code"] == "bad_result"  # a name that leads out of artifacts/

    job = world.job(*[step for step in job.spec["script"] if "../run.json" not in step])
    world.work(job)
    environment = json.loads(world.content(world.artifacts(job)["environment.json"].storage_key))
    assert "secret" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_an_artifact_that_is_a_link_is_refused(world: World) -> None:
    job = world.job(["link", "passwd", "/etc/passwd"], ["finish", "succeeded", {}])
    world.work(job)
    assert world.now(job).failure["code"] == "bad_result"
    assert set(world.artifacts(job)) == {"log.txt"}


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
    monkeypatch.setattr("worker.process.memory_kills", lambda: None)  # the kernel does not say for what
    job = world.job(["print", "last words"], metrics(1, 1.0), ["raw", '{"type": "progr'], step)
    world.work(job)
    row = world.now(job)
    assert row.failure["log_tail"][0] == "last words"
    assert row.failure | {"log_tail": []} == {"class": "infra", "code": "run_died", "detail": detail, "log_tail": []}
    assert len(world.all(JobMetric)) == 1  # and the half line is no event
    assert world.codes(job) == ["claimed", "failed"]


def test_a_run_that_somebody_else_ended(world: World) -> None:
    job = world.job(["finish", "cancelled", {}])
    world.work(job)
    assert world.now(job).failure["code"] == "run_terminated"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"status": "done"}', '{"status": "succeeded", "results": {"x": NaN}}', "[" * 100_000]
)
def test_an_unreadable_result(world: World, text: str) -> None:
    job = world.job(["write", "result.json", text])
    world.work(job)
    assert world.now(job).failure["code"] == "bad_result"


@pytest.mark.timeout(30)  # reading goes on at once, not when the lease is renewed
def test_unreadable_events_are_warnings(each_world: World) -> None:
    world = each_world
    world.settings.lease_s = 300.0
    bad = [
        "{not json}",
        "[]",
        '{"type": "dance"}',
        '{"type": "metrics", "subject": "student", "step": 99999999999, "epoch": 1, "values": {}}',
        '{"type": "metrics", "subject": "student", "step": 1, "epoch": 1, "values": {"x": NaN}}',
        "[" * 50_000,
        "x" * 3_000_000,
        "<NUL>",
    ]
    good = '{"type": "message", "level": "info", "code": "nul", "message": "a\\u0000b\\ud800c"}'
    job = world.job(["raw", "\n".join([*bad, good]) + "\n"], ["finish", "succeeded", {}])

    world.work(job)

    assert world.now(job).status == "succeeded"
    assert world.codes(job) == ["claimed", *["malformed_event"] * len(bad), "nul", "succeeded"]
    assert (
        next(event.message for event in world.all(JobEvent) if event.code == "nul") == "a\N{REPLACEMENT CHARACTER}b?c"
    )


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


def test_the_lease_is_renewed_while_nothing_happens(tmp_path: Path) -> None:
    world = World(tmp_path / "home", lease_s=0.6)
    job = world.job(["wait_for", str(tmp_path / "go")], ["finish", "succeeded", {}])
    with world.working(job):
        first = until(lambda: world.now(job).lease_expires_at)
        until(lambda: world.now(job).lease_expires_at > first + timedelta(seconds=0.6))
        (tmp_path / "go").touch()
    assert world.now(job).status == "succeeded"


def test_no_event_is_lost_while_the_database_is_away(world: World, tmp_path: Path) -> None:
    job = world.job(
        progress("teacher", 0.1),
        ["wait_for", str(tmp_path / "go")],
        *[metrics(step, 1.0) for step in range(50)],
        ["event", "message", "info", "said", "while away", {}],
        ["finish", "succeeded", {}],
    )
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.database.failures = 8
        until(world.database.failed.is_set)
        (tmp_path / "go").touch()
        until(lambda: world.database.failures == 0)
    assert world.now(job).status == "succeeded"
    assert [metric.step for metric in world.all(JobMetric)] == list(range(50))
    assert world.codes(job) == ["claimed", "said", "succeeded"]


def test_what_was_committed_is_not_undone_or_doubled_when_the_answer_was_lost(world: World, tmp_path: Path) -> None:
    job = world.job(
        progress("teacher", 0.1),
        ["wait_for", str(tmp_path / "go")],
        metrics(1, 1.0),
        ["event", "message", "info", "said", "once", {}],
        ["checkpoint", "a.pt", "saved"],
        ["until_told"],
        ["finish", "cancelled", {}],
    )
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.database.lost_answers = 2  # of the metrics and the message
        world.storage.match, world.storage.failures = "resume/", 10**6
        (tmp_path / "go").touch()
        until(lambda: "checkpoint_not_kept" in world.codes(job))
        until(lambda: world.database.lost_answers == 0)
        world.database.lost_answers = 2  # of the checkpoint
        world.storage.failures = 0
        until(lambda: world.database.lost_answers == 0)
        world.stop.set()
    row = world.now(job)
    assert row.status == "queued"
    assert world.content(row.resume_key) == b"saved"
    assert len(world.all(JobMetric)) == 1
    assert world.codes(job) == ["claimed", "said", "checkpoint_not_kept", "interrupted"]


def test_a_lease_that_was_taken_while_the_database_was_away(world: World, tmp_path: Path) -> None:
    job = world.job(progress("teacher", 0.1), ["wait_for", str(tmp_path / "go")], metrics(1, 1.0), ["sleep_forever"])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, attempt=2, lease_owner="another")
        world.database.failures = 3
        (tmp_path / "go").touch()
    assert world.all(JobMetric) == []


def test_an_upload_is_tried_again(world: World) -> None:
    world.storage.match, world.storage.failures = "artifacts/", 2
    job = world.job(["artifact", "a.txt", "log", "text", {}], ["finish", "succeeded", {}])
    world.work(job)
    assert world.now(job).status == "succeeded"


def test_an_upload_that_keeps_failing_is_an_infra_failure(world: World) -> None:
    world.settings.storage_patience_s = 0.2
    world.storage.match, world.storage.failures = "artifacts/", 10**6
    job = world.job(["print", "fine"], ["artifact", "a.txt", "log", "text", {}], ["finish", "succeeded", {}])
    world.work(job)
    row = world.now(job)
    assert row.status == "failed"
    assert (row.failure["class"], row.failure["code"]) == ("infra", "storage_failed")
    assert "No space left on device" in row.failure["detail"]
    assert row.failure["log_tail"] == ["fine"]
    assert world.artifacts(job) == {}


def test_a_job_waits_with_its_worker_for_a_store_that_cannot_be_read(world: World) -> None:
    world.storage.unreadable = True
    job = world.job(["finish", "succeeded", {}])
    with world.working(job):
        until(lambda: world.storage.refused > 3)
        world.storage.unreadable = False
    row = world.now(job)
    assert (row.status, row.attempt, row.failed_attempts) == ("succeeded", 1, 0)
    assert world.codes(job) == ["claimed", "succeeded"]


def test_who_has_lost_the_lease_waits_no_longer_for_the_store(world: World) -> None:
    world.storage.unreadable = True
    job = world.job(["finish", "succeeded", {}])
    with world.working(job):
        until(lambda: world.storage.refused > 1)
        world.set(job, attempt=2, lease_owner="another")
    row = world.now(job)
    assert (row.attempt, row.lease_owner) == (2, "another")
    assert world.codes(job) == ["claimed"]
    assert world.scratch_left() == []


def test_inputs_that_stay_unreadable_are_an_infra_failure(world: World) -> None:
    world.settings.storage_patience_s = 0.1
    world.storage.unreadable = True
    job = world.job(["finish", "succeeded", {}])
    world.work(job)
    assert world.now(job).failure["code"] == "inputs_unavailable"


@pytest.mark.parametrize(("asked", "status"), [("cancelling", "cancelled"), ("pausing", "paused")])
def test_nobody_waits_long_for_a_store_to_cancel_or_pause(
    world: World, monkeypatch: pytest.MonkeyPatch, asked: str, status: str
) -> None:
    monkeypatch.setattr("worker.patience.HURRY_S", 0.1)
    world.storage.unreadable = True
    job = world.job(["finish", "succeeded", {}])
    with world.working(job):
        until(lambda: world.storage.refused > 1)
        world.set(job, status=asked)
    row = world.now(job)
    assert (row.status, row.failure) == (status, None)


def test_a_job_whose_results_cannot_be_stored_can_be_cancelled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.patience.HURRY_S", 0.1)
    world.storage.match, world.storage.failures = "artifacts/", 10**6
    job = world.job(["artifact", "a.txt", "log", "text", {}], ["finish", "succeeded", {}])
    with world.working(job):
        until(lambda: world.storage.failures < 10**6 - 2)
        world.set(job, status="cancelling")
    assert (world.now(job).status, world.now(job).failure) == ("cancelled", None)


def test_checkpoints_are_kept_for_the_next_attempt(each_world: World, tmp_path: Path) -> None:
    world = each_world
    job = world.job(
        ["checkpoint", "a.pt", "one"],
        ["wait_for", str(tmp_path / "go")],
        ["checkpoint", "b.pt", "two"],
        ["sleep_forever"],
    )
    with world.working(job):
        until(lambda: world.now(job).resume_key == f"jobs/{job.id}/resume/1-1.pt")
        (tmp_path / "go").touch()
        until(lambda: world.now(job).resume_key == f"jobs/{job.id}/resume/1-2.pt")
        until(lambda: world.storage.list(f"jobs/{job.id}") == [f"jobs/{job.id}/resume/1-2.pt"])
        # The worker is lost, as it were.
        world.set(job, attempt=1, lease_owner="lost", lease_expires_at=utcnow() - timedelta(seconds=1))
    assert world.content(world.now(job).resume_key) == b"two"

    world.set(job, spec={**job.spec, "script": [["finish", "succeeded", {}]]})
    settings = world.settings.model_copy(update={"max_attempts": 2})  # or the loss would be the end
    world.work(job, context=replace(world.context, settings=settings))
    row = world.now(job)
    assert (row.status, row.attempt, row.resume_key) == ("succeeded", 2, None)
    assert world.codes(job) == ["claimed", "resumed", "succeeded"]
    assert world.storage.list(f"jobs/{job.id}") == [f"jobs/{job.id}/artifacts/2/log.txt"]


def test_a_checkpoint_that_cannot_be_kept_is_a_warning_and_tried_again(world: World, tmp_path: Path) -> None:
    world.storage.match, world.storage.failures = "resume/", 3
    job = world.job(["checkpoint", "a.pt", "one"], ["wait_for", str(tmp_path / "go")], ["finish", "succeeded", {}])
    with world.working(job):
        until(lambda: world.now(job).resume_key is not None)
        assert world.content(world.now(job).resume_key) == b"one"
        (tmp_path / "go").touch()
    assert world.now(job).status == "succeeded"
    assert world.codes(job) == ["claimed", "checkpoint_not_kept", "succeeded"]


def test_a_newer_checkpoint_takes_the_place_of_one_that_cannot_be_kept(world: World, tmp_path: Path) -> None:
    world.storage.match, world.storage.failures = "resume/", 10**6
    newer = [["wait_for", str(tmp_path / "go")], ["checkpoint", "b.pt", "two"], ["until_told"]]
    job = world.job(["checkpoint", "a.pt", "one"], *newer, ["finish", "cancelled", {}])
    with world.working(job):
        until(lambda: "checkpoint_not_kept" in world.codes(job))
        (tmp_path / "go").touch()
        until(lambda: (world.settings.scratch / "runs" / f"{job.id}-1" / "checkpoints" / "b.pt").exists())
        world.storage.failures = 0
        until(lambda: world.now(job).resume_key is not None)
        world.stop.set()
    assert world.content(world.now(job).resume_key) == b"two"
    assert world.codes(job).count("checkpoint_not_kept") == 1


def test_a_store_that_stays_away_does_not_keep_a_worker_that_must_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.patience.HURRY_S", 0.2)
    world.storage.match, world.storage.failures = "resume/", 10**6
    job = world.job(
        progress("teacher", 0.1), ["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}]
    )
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.stop.set()
    assert (world.now(job).status, world.now(job).resume_key) == ("queued", None)
    assert world.codes(job) == ["claimed", "checkpoint_not_kept", "interrupted"]


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


def test_what_dead_workers_left_is_removed(world: World) -> None:
    runs = world.settings.scratch / "runs"
    (runs / "job_dead-1").mkdir(parents=True)
    (runs / "job_dead-1" / "big").touch()
    (runs / "job_dead-1.lock").touch()
    world.work(world.job(["finish", "succeeded", {}]))
    assert world.scratch_left() == []


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
