from datetime import timedelta

import pytest
from sqlalchemy import select, update

from app.db import Database, utcnow
from app.models import Checkpoint, Dataset, Job, JobEvent, Tenant
from app.queue.leases import LeaseLost, claim, fenced, find_lost, finish, give_back, renew
from tests.support import rows as seed
from tests.support.racing import race


@pytest.fixture
def dataset(database: Database) -> Dataset:
    seed.add(database, Tenant(id="ten_1", name="lab"))
    return seed.dataset(database, "ten_1")


def _job(database: Database, dataset: Dataset, **values) -> Job:
    return seed.job(database, "ten_1", dataset.id, **values)


def _claim(database: Database, row_id: str, owner: str = "worker-1", lease_s: float = 30) -> Job | None:
    with database.write() as session:
        return claim(session, Job, row_id, owner=owner, lease_s=lease_s)


def _expire(database: Database, row_id: str, seconds: float = 1) -> None:
    with database.write() as session:
        session.execute(
            update(Job).where(Job.id == row_id).values(lease_expires_at=utcnow() - timedelta(seconds=seconds))
        )


def _read(database: Database, row_id: str) -> Job:
    with database.read() as session:
        return session.get_one(Job, row_id)


def _lost(database: Database, max_attempts: int = 5) -> list[str]:
    with database.write() as session:
        return [row_id for _, row_id in find_lost(session, redeliver_s=120, max_attempts=max_attempts)]


def test_two_hundred_rows_are_claimed_once_each(database: Database, dataset: Dataset):
    common = {"tenant_id": "ten_1", "name": "", "status": "queued", "dataset_id": dataset.id, "spec": {}, "labels": {}}
    with database.write() as session:
        session.add_all(Job(id=f"job_{n:03}", **common) for n in range(200))
    won: dict[int, list[str]] = {0: [], 1: []}

    def _work(number: int) -> None:
        for n in range(200):
            if _claim(database, f"job_{n:03}", owner=f"worker-{number}"):
                won[number].append(f"job_{n:03}")

    race(_work, 2)
    assert sorted(won[0] + won[1]) == [f"job_{n:03}" for n in range(200)]
    with database.read() as session:
        for job in session.scalars(select(Job)):
            assert (job.status, job.attempt) == ("preparing", 1)
            assert job.id in won[int(job.lease_owner[-1])]


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "preparing", "running"])
def test_only_what_waits_is_claimed(database: Database, dataset: Dataset, status: str):
    held = {"lease_owner": "w", "lease_expires_at": utcnow() + timedelta(seconds=30)}
    job = _job(database, dataset, status=status, **(held if status in Job.HELD else {}))
    assert _claim(database, job.id) is None
    assert _claim(database, "job_unknown") is None
    assert _read(database, job.id).attempt == 0


def test_each_kind_of_row_has_its_own_state(database: Database, dataset: Dataset):
    with database.write() as session:
        session.get_one(Dataset, dataset.id).status = "queued"
        assert claim(session, Dataset, dataset.id, owner="w", lease_s=30).status == "checking"
        checkpoint = Checkpoint(id="ckpt_1", tenant_id="ten_1", name="", status="queued", attempt=0)
        session.add(checkpoint)
        session.flush()
        assert claim(session, Checkpoint, "ckpt_1", owner="w", lease_s=30).status == "checking"


def test_the_first_claim_is_when_work_began(database: Database, dataset: Dataset):
    job = _job(database, dataset)
    before = utcnow()
    first = _claim(database, job.id)
    assert before <= first.started_at <= utcnow()
    _expire(database, job.id)
    second = _claim(database, job.id, owner="worker-2")
    assert second.started_at == first.started_at
    assert second.attempt == 2


def test_an_expired_lease_is_taken_over_and_the_old_attempt_changes_nothing(database: Database, dataset: Dataset):
    job = _job(database, dataset)
    old = _claim(database, job.id, owner="worker-1")
    _expire(database, job.id)
    new = _claim(database, job.id, owner="worker-1")  # even of the same worker after a restart
    for write in (
        lambda session: fenced(session, old, status="running"),
        lambda session: renew(session, old, lease_s=30),
        lambda session: finish(session, old, status="succeeded"),
    ):
        with pytest.raises(LeaseLost), database.write() as session:
            write(session)
    assert _read(database, job.id).status == "preparing"
    with database.write() as session:
        finish(session, new, status="succeeded", results={"teacher": None})
    done = _read(database, job.id)
    assert (done.status, done.lease_owner, done.lease_expires_at) == ("succeeded", None, None)
    with pytest.raises(LeaseLost), database.write() as session:
        fenced(session, new, progress={"phase": "late"})


def test_renewing_extends_the_lease_and_shows_a_cancel(database: Database, dataset: Dataset):
    job = _job(database, dataset)
    row = _claim(database, job.id, lease_s=1)
    with database.write() as session:
        session.execute(update(Job).values(status="cancelling"))
    with database.write() as session:
        fresh = renew(session, row, lease_s=60)
    assert fresh.status == "cancelling"
    assert fresh.lease_expires_at > utcnow() + timedelta(seconds=50)


def test_a_cancelled_job_whose_worker_died_stays_cancelling(database: Database, dataset: Dataset):
    job = _job(database, dataset)
    _claim(database, job.id)
    with database.write() as session:
        session.execute(update(Job).values(status="cancelling"))
    _expire(database, job.id)
    again = _claim(database, job.id, owner="worker-2")
    assert (again.status, again.attempt) == ("cancelling", 2)


def test_a_row_that_is_gone_is_a_lost_lease(database: Database, dataset: Dataset):
    row = _claim(database, _job(database, dataset).id)
    with database.write() as session:
        session.delete(session.get_one(Job, row.id))
    with pytest.raises(LeaseLost), database.write() as session:
        renew(session, row, lease_s=30)


def test_a_queued_row_is_lost_once_its_message_is_old(database: Database, dataset: Dataset):
    never = _job(database, dataset)
    fresh = _job(database, dataset, enqueued_at=utcnow())
    old = _job(database, dataset, enqueued_at=utcnow() - timedelta(seconds=121))
    done = _job(database, dataset, status="succeeded")
    assert set(_lost(database)) == {never.id, old.id}
    assert _lost(database) == []  # sent just now
    assert {fresh.id, done.id}.isdisjoint(_lost(database))


def test_a_held_row_is_lost_once_its_lease_has_expired(database: Database, dataset: Dataset):
    job = _job(database, dataset, enqueued_at=utcnow() - timedelta(seconds=10))
    _claim(database, job.id)
    assert _lost(database) == []
    _expire(database, job.id)
    assert _lost(database) == [job.id]
    assert _lost(database) == []  # that message may not have arrived yet
    with database.write() as session:
        session.execute(update(Job).values(enqueued_at=utcnow() - timedelta(seconds=121)))
    assert _lost(database) == [job.id]


def test_a_row_that_used_up_its_attempts_fails(database: Database, dataset: Dataset):
    job = _job(database, dataset, enqueued_at=utcnow() - timedelta(seconds=9), attempt=9, failed_attempts=4)
    _claim(database, job.id)
    _expire(database, job.id)
    assert _lost(database, max_attempts=6) == [job.id]
    assert _lost(database, max_attempts=5) == []
    failed = _read(database, job.id)
    with database.read() as session:
        told = [(event.level, event.code) for event in session.scalars(select(JobEvent))]
    assert told == [("error", "failed")]
    assert (failed.status, failed.failure["class"], failed.failure["code"]) == ("failed", "infra", "attempts_exhausted")
    assert failed.finished_at is not None
    assert _claim(database, job.id) is None


def test_only_a_lost_worker_is_held_against_a_row(database: Database, dataset: Dataset):
    job = _job(database, dataset)
    for attempt in range(1, 4):
        row = _claim(database, job.id)
        assert (row.attempt, row.failed_attempts) == (attempt, 0)
        with database.write() as session:
            give_back(session, row, status="queued")
    _claim(database, job.id)
    _expire(database, job.id)
    again = _claim(database, job.id, owner="worker-2")
    assert (again.attempt, again.failed_attempts) == (5, 1)


def test_a_row_that_was_given_back_is_nobodys(database: Database, dataset: Dataset):
    row = _claim(database, _job(database, dataset, enqueued_at=utcnow()).id)
    with database.write() as session:
        give_back(session, row, status="queued", failed_attempts=1)
    now = _read(database, row.id)
    assert (now.status, now.failed_attempts, now.lease_owner, now.lease_expires_at) == ("queued", 1, None, None)
    assert _lost(database) == [row.id]  # its message is sent at once, although the old one is not stale
    with pytest.raises(LeaseLost), database.write() as session:
        give_back(session, row, status="queued")


def test_a_row_that_is_to_wait_is_claimed_and_sent_when_it_is_due(database: Database, dataset: Dataset):
    soon = utcnow() + timedelta(seconds=60)
    job = _job(database, dataset, not_before=soon)
    assert _claim(database, job.id) is None
    assert _lost(database) == []
    with database.write() as session:
        session.execute(update(Job).values(not_before=utcnow() - timedelta(seconds=1)))
    assert _lost(database) == [job.id]
    row = _claim(database, job.id)
    assert (row.attempt, row.not_before) == (1, None)


def test_sweeps_at_once_tell_an_end_once(database: Database, dataset: Dataset):
    for _ in range(20):
        _claim(database, _job(database, dataset, failed_attempts=4).id)
    with database.write() as session:
        session.execute(update(Job).values(lease_expires_at=utcnow() - timedelta(seconds=1)))
    race(lambda _number: _lost(database, max_attempts=5), 4)
    with database.read() as session:
        assert sorted(session.scalars(select(JobEvent.job_id))) == sorted(session.scalars(select(Job.id)))


def test_cancelling_is_never_given_up(database: Database, dataset: Dataset):
    job = _job(database, dataset, enqueued_at=utcnow() - timedelta(seconds=200), failed_attempts=9)
    _claim(database, job.id)
    with database.write() as session:
        session.execute(update(Job).values(status="cancelling"))
    _expire(database, job.id)
    assert _lost(database, max_attempts=5) == [job.id]
    assert _read(database, job.id).status == "cancelling"
