"""Events and leases while the database, or its answer to a commit, does not arrive."""

from datetime import timedelta
from pathlib import Path

from app.models import JobMetric
from tests.support.waiting import until
from tests.support.worker_world import World, log_metrics, progress

SUCCEED = ["finish", "succeeded", {}]


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
        *[log_metrics(step, 1.0) for step in range(50)],
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
        log_metrics(1, 1.0),
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
    job = world.job(
        progress("teacher", 0.1), ["wait_for", str(tmp_path / "go")], log_metrics(1, 1.0), ["sleep_forever"]
    )
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, attempt=2, lease_owner="another")
        world.database.failures = 3
        (tmp_path / "go").touch()
    assert world.all(JobMetric) == []


def test_a_commit_whose_answer_is_lost_doubles_no_message(each_world: World, tmp_path: Path) -> None:
    world = each_world
    job = world.job(
        progress("teacher", 0.25),
        ["wait_for", str(tmp_path / "go")],
        ["event", "message", "info", "first", "the same text", {}],
        ["event", "message", "info", "first", "the same text", {}],
        ["checkpoint", "a.pt", "one"],
        ["event", "metrics", "student", {"step": 1, "epoch": 0.1, "values": {"loss/total": 1.0}}],
        ["wait_for", str(tmp_path / "end")],
        SUCCEED,
    )
    world.storage.match, world.storage.failures = "resume/", 1
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.database.lost_answers = 4
        (tmp_path / "go").touch()
        until(lambda: world.database.lost_answers == 0 and "checkpoint_not_kept" in world.codes(job))
        (tmp_path / "end").touch()
    assert world.now(job).status == "succeeded"
    assert sorted(world.codes(job)) == ["checkpoint_not_kept", "claimed", "first", "first", "succeeded"]
    assert len(world.all(JobMetric)) == 1
