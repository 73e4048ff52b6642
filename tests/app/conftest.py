"""The service as its users meet it: the real application over a test client; only the broker is replaced."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from app.db import Database
from app.keys.service import create_key
from app.main import create_app
from app.models import Leased
from app.ops import admin as admin_command
from app.queue.messages import Queue
from app.settings import MIB, Settings
from app.specs.catalog import Catalog, load_catalog
from app.storage import Storage
from tests.support.catalog import CATALOG

# For the many cases of one rule that no database has a part in.
ONE_DATABASE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class RecordingQueue(Queue):
    """The real queue's rules, with the messages kept here in place of a broker."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1/0")
        self.sent: list[tuple[str, str]] = []

    def send(self, model: type[Leased], row_id: str) -> None:
        self.sent.append((model.TASK, row_id))

    def ping(self) -> None:
        return

    def untaken(self) -> frozenset[str]:
        return frozenset()


@dataclass(frozen=True)
class Tenant:
    """One team with a key."""

    id: str
    key_id: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@pytest.fixture
def settings(database_url: str, storage_url: str, tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    return Settings(
        home=tmp_path / "home",
        database_url=database_url,
        storage_url=storage_url,
        secret=SecretStr("a secret for tests only"),
        dataset_roots=[tmp_path / "data"],
        max_upload_bytes=4 * MIB,
        sweep_s=3600,
    )


@pytest.fixture(scope="session")
def _shared_app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    # FastAPI builds each route at its first request, which costs more than most tests do.
    made = create_app(Settings(home=tmp_path_factory.mktemp("unused")))
    made.dependency_overrides[load_catalog] = lambda: Catalog(CATALOG)
    return made


@pytest.fixture
def app(_shared_app: FastAPI, settings: Settings) -> FastAPI:
    """The application, not yet started, with this test's settings."""
    _shared_app.state.settings = settings
    return _shared_app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as opened:
        app.state.queue = RecordingQueue()
        yield opened


@pytest.fixture
def queue(app: FastAPI, client: TestClient) -> RecordingQueue:
    return app.state.queue


@pytest.fixture
def storage(app: FastAPI, client: TestClient) -> Storage:
    return app.state.storage


@pytest.fixture
def make_tenant(database: Database, settings: Settings) -> Callable[[str], Tenant]:
    def _make(name: str) -> Tenant:
        with database.write() as session:
            row, plaintext = create_key(session, settings, name, "laptop")
        return Tenant(id=row.tenant_id, key_id=row.id, key=plaintext)

    return _make


@pytest.fixture
def admin(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `defeat admin` with this test's settings and return (exit code, output, errors)."""
    monkeypatch.setattr(admin_command, "get_settings", lambda: settings)

    def _run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            admin_command.app(list(arguments), prog_name="defeat admin")
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return _run


@pytest.fixture
def alice(make_tenant: Callable[[str], Tenant]) -> Tenant:
    return make_tenant("alice's lab")


@pytest.fixture
def bob(make_tenant: Callable[[str], Tenant]) -> Tenant:
    return make_tenant("bob's lab")


@pytest.fixture
def api(client: TestClient, alice: Tenant) -> TestClient:
    """The client with Alice's key."""
    client.headers.update(alice.headers)
    return client
