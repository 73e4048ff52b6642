"""`defeat doctor` with services that work, and with each of them broken."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from app.db import Database, utcnow
from app.migrate import downgrade
from app.ops import doctor
from app.ops.doctor import Finding, examine
from app.queue.messages import Answer, Queue
from app.settings import GIB, Settings
from tests.app.queue.test_messages import _broker
from tests.app.workers.test_workers import worker
from tests.support import rows as seed

Settled = Callable[..., dict[str, Finding]]
OWN = version("defeat-service")
ONE, TWO = Answer(("jobs",), OWN), Answer(("checks",), OWN)


@pytest.fixture
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("q") / "b.sock"
    with _broker(socket):
        yield f"redis+socket://{socket}"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """What workers answer on the broker."""
    given = {"one@host": ONE, "two@host": TWO}
    monkeypatch.setattr(Queue, "workers", lambda _queue: given)
    return given


def beat(database_url: str, name: str, queue: str, *, age_s: float = 0.0, **values: Any) -> None:
    """Register a worker whose last heartbeat was `age_s` seconds ago."""
    database = Database(database_url)
    row_id = f"wkr_{name}_{age_s:.0f}"
    seen_at = utcnow() - timedelta(seconds=age_s)
    seed.add(database, worker(name, id=row_id, queues=[queue], seen_at=seen_at, **values))
    database.dispose()


@pytest.fixture
def beats(database_url: str) -> str:
    """The URL of a database with two registered workers, both of which answer."""
    beat(database_url, "one@host", "jobs")
    beat(database_url, "two@host", "checks")
    return database_url


@pytest.fixture
def found(broker: str, sqlite_url: str, tmp_path: Path, answers: dict[str, Answer]) -> Settled:
    """Run the checks with these settings and two workers that answer."""

    def _found(**values: Any) -> dict[str, Finding]:
        urls = {"database_url": sqlite_url, "redis_url": broker, "storage_url": ""}
        settings = Settings(home=tmp_path / "home", **urls | values)
        return {finding.check: finding for finding in examine(settings)}

    return _found


@pytest.mark.parametrize(("free", "state"), [(64 * 2**20, "warning"), (GIB // 2, "ok")])
def test_shared_memory_for_several_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: str) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    finding = doctor._shared_memory()
    assert (finding.check, finding.state) == ("shared memory", state)
    assert f"{free / GIB:.2f} GiB are free in /dev/shm" in finding.detail
    monkeypatch.undo()
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path / "none")
    assert doctor._shared_memory().state == "warning"


def test_all_is_well(found: Settled, beats: str) -> None:
    findings = found(database_url=beats, secret=SecretStr("a secret for tests only"))
    assert {finding.state for finding in findings.values()} == {"ok"}, findings
    expected = {"versions", "secret", "scratch", "shared memory", "database", "migrations", "storage", "broker"}
    expected |= {"workers for jobs", "workers for checks"}
    assert set(findings) - {"clock"} == expected
    assert findings["workers for jobs"].detail == "one@host"
    assert ("clock" in findings) == (not beats.startswith("sqlite"))
    assert "defeat-service" in findings["versions"].detail


def test_on_s3(found: Settled, s3_url: str) -> None:
    assert found(storage_url=s3_url)["storage"].state == "ok"
    wrong = found(storage_url="s3://defeat-no-such-bucket")["storage"]
    assert wrong.state == "wrong"
    assert "the bucket does not exist" in wrong.detail


def test_a_database_that_is_away(found: Settled) -> None:
    findings = found(database_url="postgresql+psycopg://nobody@127.0.0.1:1/defeat")
    assert findings["database"].state == "wrong"
    assert "refused" in findings["database"].detail
    assert "DATABASE_URL" in (findings["database"].advice or "")
    assert findings["storage"].state == "ok"  # the other checks still run
    assert findings["workers for jobs"] == Finding("workers for jobs", "ok", "one@host")
    assert "worker one@host" not in findings  # whether it is registered cannot be known


def test_a_database_without_tables(found: Settled, empty_postgres_url: str) -> None:
    finding = found(database_url=empty_postgres_url)["migrations"]
    assert finding.state == "wrong"
    assert "at revision none" in finding.detail
    assert "admin migrate" in (finding.advice or "")


def test_a_database_of_another_version(found: Settled, sqlite_url: str) -> None:
    downgrade(sqlite_url, "base")
    assert found()["migrations"].state == "wrong"


@pytest.mark.parametrize(("skew_s", "state"), [(0.1, "ok"), (-3.0, "warning"), (600.0, "warning"), (-901.0, "wrong")])
def test_a_clock_that_is_off(skew_s: float, state: str) -> None:
    finding = doctor._clock(skew_s)
    assert finding.state == state
    assert ("ahead of" if skew_s > 0 else "behind") in finding.detail


def test_an_old_postgresql() -> None:
    assert doctor._server("postgresql", "9.6.24").state == "wrong"
    assert doctor._server("postgresql", "17.2 (Debian 17.2-1)").state == "ok"


def test_a_broker_that_is_away(found: Settled, beats: str) -> None:
    findings = found(redis_url="redis://127.0.0.1:1/0", database_url=beats)
    assert findings["broker"].state == "wrong"
    assert findings["workers for jobs"] == Finding("workers for jobs", "ok", "one@host")
    assert "worker one@host" not in findings  # whether it would answer cannot be known


def test_neither_database_nor_broker(found: Settled) -> None:
    findings = found(redis_url="redis://127.0.0.1:1/0", database_url="postgresql+psycopg://nobody@127.0.0.1:1/defeat")
    assert not any(name.startswith("worker") for name in findings)


def test_a_broker_that_drops_messages(found: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queue, "server", lambda _queue: {"version": "8.0", "eviction": "allkeys-lru"})
    assert found()["broker"].state == "warning"


def test_no_worker_for_a_queue(found: Settled, sqlite_url: str, answers: dict[str, Answer]) -> None:
    del answers["two@host"]
    beat(sqlite_url, "one@host", "jobs")
    findings = found()
    assert findings["workers for jobs"].state == "ok"
    assert findings["workers for checks"].state == "wrong"
    assert "--queues checks" in (findings["workers for checks"].advice or "")


def test_a_worker_that_hears_no_messages(found: Settled, beats: str, answers: dict[str, Answer]) -> None:
    del answers["two@host"]
    findings = found(database_url=beats)
    assert findings["worker two@host"].state == "wrong"
    assert "reaches the database, but does not answer on the broker" in findings["worker two@host"].detail
    assert "REDIS_URL" in (findings["worker two@host"].advice or "")
    assert findings["workers for checks"].state == "wrong"
    assert (findings["workers for jobs"].state, "worker one@host" in findings) == ("ok", False)


@pytest.mark.parametrize(
    ("age_s", "told"), [(None, "it is not registered"), (300.0, r"its last heartbeat was 3\d\d s ago")]
)
def test_a_worker_that_does_not_reach_the_database(
    found: Settled, sqlite_url: str, age_s: float | None, told: str
) -> None:
    beat(sqlite_url, "one@host", "jobs")
    if age_s is not None:
        beat(sqlite_url, "two@host", "checks", age_s=age_s)
    findings = found()
    assert findings["worker two@host"].state == "wrong"
    told = f"answers on the broker, but does not reach the database: {told}"
    assert re.fullmatch(told, findings["worker two@host"].detail)
    assert "DATABASE_URL" in (findings["worker two@host"].advice or "")
    assert findings["workers for checks"].state == "wrong"


def test_a_worker_that_is_gone(found: Settled, beats: str) -> None:
    beat(beats, "three@host", "jobs", age_s=45.0)
    beat(beats, "one@host", "jobs", age_s=60.0)  # it was killed and started again
    findings = found(database_url=beats)
    assert findings["worker three@host"].state == "warning"
    assert re.fullmatch(r"has stopped: its last heartbeat was 4\d s ago", findings["worker three@host"].detail)
    assert findings["workers for jobs"] == Finding("workers for jobs", "ok", "one@host")
    assert "worker one@host" not in findings
    assert "does not answer" in found(database_url=beats, lease_s=120.0)["worker three@host"].detail


@pytest.mark.parametrize("answering", [True, False])
def test_workers_that_drain(found: Settled, beats: str, answers: dict[str, Answer], answering: bool) -> None:
    beat(beats, "three@host", "jobs", draining=True)
    beat(beats, "four@host", "checks", draining=True)
    if answering:
        answers |= {"three@host": ONE, "four@host": TWO}
    findings = found(database_url=beats)
    assert findings["workers for jobs"] == Finding("workers for jobs", "ok", "one@host; draining: three@host")
    assert not any(name.startswith("worker ") for name in findings)

    del answers["one@host"]
    jobs = found(database_url=beats)["workers for jobs"]
    assert (jobs.state, jobs.detail) == ("wrong", "none is running that claims new rows; draining: three@host")
    assert jobs.advice == "defeat admin workers --undrain three@host, or start one: python -m worker --queues jobs"


def test_workers_of_other_versions(found: Settled, beats: str, answers: dict[str, Answer]) -> None:
    answers["one@host"] = Answer(("jobs",), "0.0.1")
    answers["two@host"] = Answer((), None)
    findings = found(database_url=beats)
    assert findings["version of one@host"].state == "warning"
    assert findings["version of one@host"].detail == f"runs version 0.0.1, but this is {OWN}"
    assert "version unknown, an old one" in findings["version of two@host"].detail
    assert findings["workers for checks"] == Finding("workers for checks", "ok", "two@host")  # as it is registered


def test_a_secret_that_several_machines_cannot_share(found: Settled, postgres_url: str) -> None:
    assert found(database_url=postgres_url)["secret"].state == "warning"


def test_a_scratch_space_that_cannot_be_written(found: Settled, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "scratch").write_text("a file")
    assert found()["scratch"].state == "wrong"


@pytest.mark.parametrize(("free_gib", "state"), [(0.5, "wrong"), (5.0, "warning"), (50.0, "ok")])
def test_room(found: Settled, monkeypatch: pytest.MonkeyPatch, free_gib: float, state: str) -> None:
    usage = SimpleNamespace(total=100 * GIB, free=int(free_gib * GIB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage)
    assert found()["scratch"].state == state


def test_the_command(
    broker: str,
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Queue, "workers", lambda _queue: {"one@host": TWO})
    for name, value in {"DEFEAT_HOME": str(tmp_path), "DATABASE_URL": sqlite_url, "REDIS_URL": broker}.items():
        monkeypatch.setenv(name, value)

    assert doctor.main(["--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "wrong"
    assert {"check", "state", "detail", "advice"} == set(document["checks"][0])

    assert doctor.main([]) == 1
    lines = capsys.readouterr().out
    assert "WRONG    workers for jobs: none is running for queue `jobs`" in lines
    assert "-> start one: python -m worker --queues jobs" in lines
    assert "WRONG    worker one@host: answers on the broker, but" in lines

    monkeypatch.setenv("DEFEAT_LEASE_S", "-1")
    with pytest.raises(SystemExit) as caught:
        doctor.main([])
    assert caught.value.code == 2
