"""A served, seeded application and a real browser to look at it."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, ViewportSize, sync_playwright

from app.db import Database
from app.http.auth import SESSION_COOKIE, make_session
from app.keys.service import create_key
from app.main import create_app
from app.migrate import upgrade
from app.settings import Settings
from app.storage import Storage
from tests.support.dashboard_rows import Seeded, seed

CHROMIUM = shutil.which("chromium")
WINDOW: ViewportSize = {"width": 1280, "height": 900}
BROWSER_ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@dataclass(frozen=True)
class Service:
    """The running application, seen from outside and from behind."""

    url: str
    settings: Settings
    database: Database
    storage: Storage
    key: str
    key_id: str
    seeded: Seeded

    def new_key(self, tenant: str) -> tuple[str, str]:
        """Make a key for a tenant; return (key id, plaintext)."""
        with self.database.write() as session:
            row, plaintext = create_key(session, self.settings, tenant, "test")
            return row.id, plaintext

    def cookie(self, key_id: str) -> str:
        return make_session(self.settings, key_id)

    def read_page(self, path: str) -> str:
        """Return a page as a signed-in browser gets it, before its script runs."""
        response = httpx2.get(self.url + path, cookies={SESSION_COOKIE: self.cookie(self.key_id)})
        assert response.status_code == 200, f"{path}: {response.status_code}"
        return response.text


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home: Path = tmp_path_factory.mktemp("dashboard")
    # No broker: pages need none, and the API must not need one to answer them. The sweep would send messages.
    settings = Settings(home=home, redis_url="redis://127.0.0.1:1", sweep_s=3600, log_level="WARNING")
    upgrade(settings.database_url)
    database, storage = Database(settings.database_url), Storage(settings.storage_url)
    with database.write() as session:
        row, key = create_key(session, settings, "lab", "browser")
    seeded = seed(database, storage, row.tenant_id, more_jobs=24)
    with _served(settings) as url:
        yield Service(url, settings, database, storage, key, row.id, seeded)
    database.dispose()


class _served:
    """Serve the application on a free port of the loopback interface, in a thread."""

    def __init__(self, settings: Settings) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(settings), log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            assert self._thread.is_alive(), "the server died"
            time.sleep(0.01)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        self._socket.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: the dashboard is tested in a real browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


class Complaints(list[str]):
    """What the browser complained about: script errors, console errors, violations of the security policy.

    A test that provokes some names them in `expected`, by a part of their text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[str] = []

    def watch(self, page: Page) -> None:
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.append(f"page error: {error}"))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.append(f"console {message.type}: {message.text}")

    def unexpected(self) -> list[str]:
        return [text for text in self if not any(part in text for part in self.expected)]


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def visitor(browser: Browser, service: Service, complaints: Complaints) -> Iterator[BrowserContext]:
    """A browser without a session. At the end it must have complained of nothing unexpected."""
    context = browser.new_context(base_url=service.url, viewport=WINDOW)
    context.on("page", complaints.watch)
    yield context
    context.close()
    assert complaints.unexpected() == []


@pytest.fixture(scope="session")
def _signed_in(browser: Browser, service: Service) -> Iterator[BrowserContext]:
    # One for all tests: it has the scripts in its cache after the first.
    context = browser.new_context(base_url=service.url, viewport=WINDOW)
    sign_in(context, service, service.key_id)
    yield context
    context.close()


@pytest.fixture
def page(_signed_in: BrowserContext, complaints: Complaints) -> Iterator[Page]:
    """A signed-in browser's page. At the end it must have complained of nothing unexpected."""
    page = _signed_in.new_page()
    complaints.watch(page)
    yield page
    page.close()
    assert complaints.unexpected() == []


def sign_in(context: BrowserContext, service: Service, key_id: str) -> None:
    """Give a browser the session of a key."""
    context.add_cookies([{"name": SESSION_COOKIE, "value": service.cookie(key_id), "url": service.url}])


def wait_until(page: Page, expression: str) -> None:
    """Wait until a JavaScript expression is true. Playwright's own waiting would need `unsafe-eval` in the policy."""
    deadline = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"still not true: {expression}"
        page.wait_for_timeout(50)
