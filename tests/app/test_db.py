import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError, StatementError

from app import db
from app.db import Database, after_commit, make_engine, update_count
from app.models import Job, JobEvent, Tenant
from tests.support import rows as seed
from tests.support.racing import race


@pytest.fixture
def job(database: Database) -> Job:
    seed.add(database, Tenant(id="ten_1", name="lab"))
    return seed.job(database, "ten_1", seed.dataset(database, "ten_1").id)


def test_two_writers_lose_no_update(database: Database, job: Job):
    def _add_fifty(_number: int) -> None:
        for _ in range(50):
            with database.write() as session:
                row = session.scalars(select(Job).where(Job.id == job.id).with_for_update()).one()
                row.attempt += 1

    race(_add_fifty, 2)
    with database.read() as session:
        assert session.get_one(Job, job.id).attempt == 100


def test_a_reader_does_not_wait_for_a_writer(database: Database, job: Job):
    with database.write() as writing:
        writing.get_one(Job, job.id).name = "renamed"
        writing.flush()
        with database.read() as session:
            assert session.get_one(Job, job.id).name == "cells-small"


def test_messages_go_out_after_the_commit_and_only_then(database: Database, job: Job):
    seen: list[str] = []

    def _look() -> None:
        with database.read() as session:
            seen.append(session.get_one(Job, job.id).name)

    with database.write() as session:
        session.get_one(Job, job.id).name = "renamed"
        after_commit(session, _look)
        assert seen == []
    assert seen == ["renamed"]
    with pytest.raises(ZeroDivisionError), database.write() as session:  # noqa: PT012
        after_commit(session, _look)
        raise ZeroDivisionError
    assert seen == ["renamed"]


def test_an_error_rolls_back(database: Database, job: Job):
    with pytest.raises(ZeroDivisionError), database.write() as session:  # noqa: PT012
        session.get_one(Job, job.id).name = "renamed"
        session.flush()
        raise ZeroDivisionError
    with database.read() as session:
        assert session.get_one(Job, job.id).name == "cells-small"


def test_times_keep_their_moment_whatever_the_zone(database: Database, job: Job):
    moment = datetime(2026, 5, 17, 1, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
    with database.write() as session:
        session.get_one(Job, job.id).started_at = moment
    with database.read() as session:
        read = session.get_one(Job, job.id).started_at
    assert read == moment
    assert read.tzinfo == UTC
    with pytest.raises(StatementError, match="has no time zone"), database.write() as session:
        session.get_one(Job, job.id).started_at = datetime(2026, 5, 17)  # noqa: DTZ001


def test_nothing_is_null_in_json_and_not_the_word(database: Database, job: Job):
    with database.read() as session:
        found = session.scalars(select(Job.id).where(Job.progress.is_(None))).all()
    assert found == [job.id]


def test_deleting_a_job_takes_its_events(database: Database, job: Job):
    seed.add(database, JobEvent(job_id=job.id, level="info", code="created", message=""))
    with database.write() as session:
        assert update_count(session, Job.__table__.delete()) == 1
    with database.read() as session:
        assert session.scalars(select(JobEvent)).all() == []


def _being_written(path: Path) -> sqlite3.Connection:
    """Return another process's connection, as it were, that has begun to write to a new file."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("CREATE TABLE first (number INTEGER)")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO first VALUES (1)")
    return connection


def test_a_new_file_that_another_starter_writes_to_is_waited_for(tmp_path: Path):
    path = tmp_path / "new.sqlite3"
    with closing(_being_written(path)) as other:
        threading.Timer(0.3, other.execute, ["COMMIT"]).start()
        engine = make_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
            assert connection.exec_driver_sql("SELECT number FROM first").all() == [(1,)]
        engine.dispose()


def test_a_new_file_that_stays_locked_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(db, "_SQLITE_BUSY_TIMEOUT_S", 0)
    path = tmp_path / "new.sqlite3"
    with closing(_being_written(path)), pytest.raises(OperationalError, match="database is locked"):
        make_engine(f"sqlite:///{path}").connect()
