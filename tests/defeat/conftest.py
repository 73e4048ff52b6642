from collections.abc import Iterator

import pytest

from defeat.client.client import Client
from tests.support.service import KEY, Server, Service


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("DEFEAT_URL", server.url)
    monkeypatch.setenv("DEFEAT_API_KEY", KEY)
    yield server
    server.close()


@pytest.fixture
def service(server: Server) -> Service:
    return server.service


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(patience_s=3) as client:
        yield client


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nobody listens."""
    server = Server()
    server.close()
    monkeypatch.setenv("DEFEAT_URL", server.url)
    monkeypatch.setenv("DEFEAT_API_KEY", KEY)
    return server.url
