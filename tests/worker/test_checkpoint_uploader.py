"""Training checkpoints in the object store, for the next attempt."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from app.db import utcnow
from tests.support.waiting import until
from tests.support.worker_world import World, progress


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
        # As if the worker were lost.
        world.set(job, attempt=1, lease_owner="lost", lease_expires_at=utcnow() - timedelta(seconds=1))
    assert world.content(world.now(job).resume_key) == b"two"

    world.set(job, spec={**job.spec, "script": [["finish", "succeeded", {}]]})
    settings = world.settings.model_copy(update={"max_attempts": 2})  # with 1 the lost worker would end the job
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
