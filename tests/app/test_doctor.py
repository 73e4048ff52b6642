"""The doctor with services that are well, and with each of them ill."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from app import doctor
from app.doctor import Finding, examine
from app.migrate import downgrade
from app.queue import Queue
from app.settings import GIB, Settings
from tests.app.test_queue import _broker

Settled = Callable[..., dict[str, Finding]]


@pytest.fixture
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("q") / "b.sock"
    with _broker(socket):
        yield f"redis+socket://{socket}"


@pytest.fixture
def found(broker: str, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settled:
    """Examine with some settings, and two workers that answer."""
    workers = {"one@host": ["jobs"], "two@host": ["checks"]}
    monkeypatch.setattr(Queue, "workers", lambda _queue: workers)

    def _found(**values: Any) -> dict[str, Finding]:
        urls = {"database_url": sqlite_url, "redis_url": broker, "storage_url": ""}
        settings = Settings(home=tmp_path / "home", **urls | values)
        return {finding.check: finding for finding in examine(settings)}

    return _found


def test_all_is_well(found: Settled, database_url: str) -> None:
    findings = found(database_url=database_url, secret=SecretStr("a secret for tests only"))
    assert {finding.state for finding in findings.values()} == {"ok"}, findings
    expected = {"versions", "secret", "scratch", "database", "migrations", "storage", "broker"}
    expected |= {"workers for jobs", "workers for checks"}
    assert set(findings) - {"clock"} == expected
    assert ("clock" in findings) == (not database_url.startswith("sqlite"))
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
    assert findings["storage"].state == "ok"  # the others are looked at all the same


def test_a_database_without_tables(found: Settled, empty_postgres_url: str) -> None:
    finding = found(database_url=empty_postgres_url)["migrations"]
    assert finding.state == "wrong"
    assert "at revision none" in finding.detail
    assert "app.migrate" in (finding.advice or "")


def test_a_database_of_another_version(found: Settled, sqlite_url: str) -> None:
    downgrade(sqlite_url, "base")
    assert found()["migrations"].state == "wrong"


@pytest.mark.parametrize(("skew_s", "state"), [(0.1, "ok"), (-3.0, "warning"), (20.0, "wrong"), (-600.0, "wrong")])
def test_a_clock_that_is_off(skew_s: float, state: str) -> None:
    finding = doctor._clock(skew_s, Settings(lease_s=30))
    assert finding.state == state
    assert ("ahead of" if skew_s > 0 else "behind") in finding.detail


def test_an_old_postgresql() -> None:
    assert doctor._server("postgresql", "9.6.24").state == "wrong"
    assert doctor._server("postgresql", "17.2 (Debian 17.2-1)").state == "ok"


def test_a_broker_that_is_away(found: Settled) -> None:
    findings = found(redis_url="redis://127.0.0.1:1/0")
    assert findings["broker"].state == "wrong"
    assert "workers for jobs" not in findings


def test_a_broker_that_drops_messages(found: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queue, "server", lambda _queue: {"version": "8.0", "eviction": "allkeys-lru"})
    assert found()["broker"].state == "warning"


def test_no_worker_for_a_queue(found: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queue, "workers", lambda _queue: {"one@host": ["jobs"]})
    findings = found()
    assert findings["workers for jobs"].state == "ok"
    assert findings["workers for checks"].state == "wrong"
    assert "--queues checks" in (findings["workers for checks"].advice or "")


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
    monkeypatch.setattr(Queue, "workers", lambda _queue: {})
    for name, value in {"DEFEAT_HOME": str(tmp_path), "DATABASE_URL": sqlite_url, "REDIS_URL": broker}.items():
        monkeypatch.setenv(name, value)

    assert doctor.main(["--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "wrong"
    assert {"check", "state", "detail", "advice"} == set(document["checks"][0])

    assert doctor.main([]) == 1
    lines = capsys.readouterr().out
    assert "WRONG    workers for jobs: no worker answers" in lines
    assert "-> start one: python -m worker --queues jobs" in lines

    monkeypatch.setenv("DEFEAT_LEASE_S", "-1")
    with pytest.raises(SystemExit) as caught:
        doctor.main([])
    assert caught.value.code == 2
