"""Attempts after a failure, by the real supervisor with scripted runs."""

import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from app.db import utcnow
from app.models import Job
from app.ops.sweep import sweep
from app.states import PAUSED, PAUSING
from tests.app.conftest import RecordingQueue
from tests.support.waiting import until
from tests.support.worker_world import World

SUCCEED = ["finish", "succeeded", {}]


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


def test_an_infra_failure_is_tried_again_from_the_last_checkpoint(each_world: World) -> None:
    world = each_world
    job = world.job(progress("teacher"), ["checkpoint", "a.pt", "saved"], ["kill", signal.SIGKILL])
    before = utcnow()
    world.work(job)
    row = world.now(job)
    assert (row.status, row.attempt, row.failed_attempts, row.failure) == ("queued", 1, 1, None)
    assert (row.lease_owner, row.lease_expires_at, row.enqueued_at, row.finished_at) == (None, None, None, None)
    assert timedelta(seconds=10) <= row.not_before - before < timedelta(seconds=20)
    assert world.content(row.resume_key) == b"saved"  # although the run offered it just before its end
    assert (row.progress["epoch"], row.progress["eta_s"], row.progress["images_per_s"]) == (2, None, None)
    assert world.codes(job) == ["claimed", "retrying"]
    told = world.last_message(job)
    assert "infra failure run_died: the run was killed by SIGKILL" in told
    assert f"next attempt starts at {row.not_before:%Y-%m-%d %H:%M:%S} UTC, from the last training checkpoint" in told
    assert told.endswith("failed attempt 1 of at most 3 in a row")
    assert world.artifacts(job) == {}

    world.work(job)
    assert world.now(job).attempt == 1  # the retry is not due
    world.next_attempt(job, SUCCEED)
    assert (world.now(job).status, world.now(job).attempt) == ("succeeded", 2)
    assert world.codes(job) == ["claimed", "retrying", "resumed", "succeeded"]


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
    for _ in range(4):  # more often than the limit, but with progress each time
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
    assert "storage_failed" in world.last_message(job)
    world.next_attempt(job, *job.spec["script"])
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


def test_a_failure_that_passes_pauses_a_job_that_was_to_be_paused(world: World) -> None:
    job = world.job(progress("teacher"), ["until_told"], ["fail", "infra", "disk_full", "no room"])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.set(job, status=PAUSING)
    row = world.now(job)
    assert (row.status, row.failed_attempts, row.not_before) == (PAUSED, 1, None)
    assert "the next attempt starts when its owner resumes it" in world.last_message(job)
