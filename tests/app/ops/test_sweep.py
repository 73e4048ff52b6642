import threading
from datetime import timedelta

import pytest
from redis.exceptions import ConnectionError as BrokerAway
from starlette.testclient import TestClient

from app import main
from app.db import Database, utcnow
from app.models import Job
from app.ops.sweep import sweep
from app.settings import Settings
from tests.app.conftest import RecordingQueue, Tenant
from tests.support import rows as seed


@pytest.fixture
def lost(database: Database, alice: Tenant) -> Job:
    dataset = seed.dataset(database, alice.id)
    seed.job(database, alice.id, dataset.id, enqueued_at=utcnow())
    return seed.job(database, alice.id, dataset.id, enqueued_at=utcnow() - timedelta(seconds=500))


def test_lost_rows_are_sent_again(database: Database, settings: Settings, lost: Job):
    queue = RecordingQueue()
    assert sweep(database, queue, settings) == 1
    assert queue.sent == [("worker.tasks.run_job", lost.id)]
    assert sweep(database, queue, settings) == 0


def test_no_message_is_added_to_those_that_nobody_has_taken(
    database: Database, settings: Settings, lost: Job, monkeypatch: pytest.MonkeyPatch
):
    """For any number of queued rows, and however long the workers are busy."""
    queue = RecordingQueue()
    monkeypatch.setattr(queue, "untaken", lambda: frozenset({"jobs"}))
    assert sweep(database, queue, settings) == 0
    monkeypatch.setattr(queue, "untaken", lambda: frozenset({"checks"}))
    assert sweep(database, queue, settings) == 1
    assert queue.sent == [("worker.tasks.run_job", lost.id)]


def test_nothing_is_marked_sent_while_the_broker_is_away(
    database: Database, settings: Settings, lost: Job, monkeypatch: pytest.MonkeyPatch
):
    queue = RecordingQueue()

    def _away() -> None:
        raise BrokerAway

    monkeypatch.setattr(queue, "untaken", _away)
    assert sweep(database, queue, settings) == 0
    monkeypatch.undo()
    assert sweep(database, queue, settings) == 1


def _sweepers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "sweep"}


def test_the_service_sweeps_by_itself_and_survives_a_bad_one(
    app, settings: Settings, lost: Job, monkeypatch: pytest.MonkeyPatch
):
    swept, calls = threading.Event(), []

    def _sweep(*_args: object) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the database restarts")
        swept.set()
        return 0

    monkeypatch.setattr(main, "sweep", _sweep)
    before = _sweepers()
    app.state.settings = settings.model_copy(update={"sweep_s": 0.01})
    with TestClient(app):
        assert swept.wait(20)
    assert _sweepers() == before
