"""For every test: databases (SQLite and PostgreSQL, built by the real migrations, fresh each time), and real data."""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from app.db import Database
from app.migrate import upgrade
from app.models import Base
from tests.support import postgres, s3

# One thread for torch, here and in every run that a test starts: on tensors this small a second thread costs more than
# it brings, and beside another busy process it waits for it, by spinning, for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server's maintenance database."""
    try:
        with postgres.server() as url:
            yield url
    except postgres.NoPostgres as error:
        pytest.skip(f"no PostgreSQL: {error}")


def _postgres_database(server: str) -> Iterator[str]:
    name = f"defeat_test_{secrets.token_hex(6)}"
    with psycopg.connect(postgres.driver_url(server), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def empty_postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of a PostgreSQL database without tables."""
    yield from _postgres_database(postgres_server)


@pytest.fixture(scope="session")
def _shared_postgres(postgres_server: str) -> Iterator[str]:
    for url in _postgres_database(postgres_server):
        upgrade(url)
        yield url


@pytest.fixture
def postgres_url(_shared_postgres: str) -> str:
    """URL of a migrated PostgreSQL database without rows."""
    tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
    with psycopg.connect(postgres.driver_url(_shared_postgres), autocommit=True) as connection:
        connection.execute(f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
    return _shared_postgres


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "defeat.sqlite3"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """URL of a migrated SQLite database without rows."""
    path = tmp_path / "defeat.sqlite3"
    shutil.copy(_sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of a migrated database without rows, of each kind that is supported."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database without rows, of each kind that is supported."""
    opened = Database(database_url)
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def _s3_environment() -> Iterator[dict[str, str]]:
    try:
        with s3.server() as environment:
            yield environment
    except s3.NoS3 as error:
        pytest.skip(str(error))


@pytest.fixture
def s3_url(_s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a place without objects on an S3 server; the `AWS_*` variables lead there."""
    for name, value in _s3_environment.items():
        monkeypatch.setenv(name, value)
    return s3.make_bucket(_s3_environment)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storage", choices=("local", "s3"), default="local", help="object store of the app's tests")
    parser.addoption("--faults-long", action="store_true", help="tests/faults in full, with a JSON object at the end")
    parser.addoption("--faults-seed", type=int, default=0, help="repeats the faults of a run that printed this seed")


@pytest.fixture
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an object store without objects: a directory, or with `--storage s3` on an S3 server."""
    if request.config.getoption("--storage") == "s3":
        return str(request.getfixturevalue("s3_url"))
    return (tmp_path / "home" / "objects").as_uri()


@pytest.fixture(scope="session")
def bccd() -> Path:
    """Real data with real blemishes, where there is a copy."""
    root = Path(os.environ.get("DEFEAT_TEST_DATA", "../shared/data"))
    path = (root if root.is_absolute() else REPOSITORY / root) / "bccd"
    if not path.is_dir():
        pytest.skip(f"no BCCD dataset at {path}; DEFEAT_TEST_DATA names the directory that holds it")
    return path
