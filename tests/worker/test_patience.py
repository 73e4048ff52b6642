"""How long an attempt waits for services that do not answer."""

import json
from pathlib import Path

import pytest

from app import logs
from tests.support.waiting import until
from tests.support.worker_world import World, progress
from worker.patience import pause_s


def test_pauses_grow_and_end() -> None:
    pauses = [pause_s(50.0, before, most_s=600.0) for before in range(5)]
    assert pauses == [50.0, 100.0, 200.0, 400.0, 600.0]
    assert pause_s(50.0, 10**6, most_s=600.0) == 600.0


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


def test_a_worker_that_must_end_does_not_wait_for_a_database_that_stays_away(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("INFO")
    job = world.job(progress("teacher", 0.1), ["wait_for", str(tmp_path / "go")], ["finish", "succeeded", {}])
    with world.working(job):
        until(lambda: world.now(job).status == "running")
        world.database.failures = 10**6
        world.stop.set()
        (tmp_path / "go").touch()
    world.database.failures = 0
    row = world.now(job)
    assert (row.status, row.lease_owner, row.finished_at) == ("running", "test", None)  # the next worker finds it
    stopped = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"stopped"' in line]
    assert ["database does not answer" in line["error"] for line in stopped] == [True]
    assert world.scratch_left() == []
