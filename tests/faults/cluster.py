"""A service of several machines, as processes that a test can break one by one; they share only three services."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from app.db import Database
from app.keys.service import DEFAULT_TENANT, create_key, first_key
from app.migrate import upgrade
from app.settings import Settings
from app.stack.embedded import broker_binary, broker_command
from app.stack.processes import dies_with_parent
from defeat.client.client import Client
from tests.support import postgres, s3
from tests.support.waiting import until

ADDRESS = "127.0.0.1"
START_S = 60.0

# Short, so that lost rows are found soon. Many attempts, because repeated faults must not end a job.
FAST = {
    "DEFEAT_LEASE_S": "5",
    "DEFEAT_SWEEP_S": "1",
    "DEFEAT_REDELIVER_S": "5",
    "DEFEAT_RETRY_BACKOFF_S": "0.2",
    "DEFEAT_RETRY_BACKOFF_MAX_S": "2",
    "DEFEAT_MAX_ATTEMPTS": "1000",
    "DEFEAT_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
}


class Process:
    """A process that can be killed and restarted; it ends when this process ends, and `log` has its output.

    Args:
        prefix: a command that runs it elsewhere, for example `ip netns exec NAME`.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: dict[str, str], prefix: Sequence[str] = ()
    ) -> None:
        self.log = log
        self._command = [*prefix, *command]
        self._environment = environment
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._running = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its end."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()

    def end(self) -> None:
        """Send SIGTERM and wait for its end."""
        if self._running is not None and self._running.poll() is None:
            self._running.send_signal(signal.SIGTERM)
            try:
                self._running.wait(START_S)
            except subprocess.TimeoutExpired:
                self.kill()


class Worker(Process):
    """A worker of the service: Celery's main process, its child with the supervisor, and the child's run."""

    def supervisor(self) -> psutil.Process | None:
        """Return the pool's child, which has the supervisor; None: there is none now."""
        return next((child for child in _children(self.pid) if not _is_run(child)), None)

    def run(self) -> psutil.Process | None:
        """Return the child's run; None: there is none now."""
        child = self.supervisor()
        return next((run for run in _children(child.pid) if _is_run(run)), None) if child else None


def _children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children()
    return []


def _is_run(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "defeat.engine.run" in process.cmdline()
    return False


class Cluster:
    """PostgreSQL, a broker and an S3 server; the API; and workers that share only the three services.

    Args:
        folder: for all files; each worker has its own home in it.
        server: the PostgreSQL server.
        address: on which all processes listen.
    """

    def __init__(self, folder: Path, server: postgres.Local, address: str = ADDRESS) -> None:
        self.folder = folder
        self.postgres = server
        self.address = address
        self.gate = folder / "s3-refuses-to-write"
        self.workers: dict[str, Worker] = {}
        self._broker_directory = folder / "broker"
        self._broker_directory.mkdir()
        port = postgres.free_port(address)
        broker = broker_command(broker_binary(), directory=self._broker_directory, socket_path=folder / "b.sock")
        # Of a repeated option the last value counts.
        broker += ["--bind", address, "--port", str(port), "--protected-mode", "no"]
        self.broker = Process(broker, folder / "broker.log", dict(os.environ))
        self._s3 = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.s3_server", address, str(self.gate)],
            stdout=subprocess.PIPE,
            stderr=(folder / "s3.log").open("w"),
            text=True,
            preexec_fn=dies_with_parent(),
        )
        assert self._s3.stdout is not None
        self._aws = {
            "AWS_ENDPOINT_URL": f"http://{address}:{int(self._s3.stdout.readline())}",
            "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
            "AWS_REGION": s3.REGION,
        }
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DEFEAT_", "AWS_"))},
            **FAST,
            **self._aws,
            "DATABASE_URL": server.url,
            "REDIS_URL": f"redis://{address}:{port}/0",
            "STORAGE_URL": s3.make_bucket(self._aws),
            "DEFEAT_SECRET": secrets.token_hex(16),
        }
        self._url = f"http://{address}:{postgres.free_port(address)}"
        command = ["uvicorn", "app.main:create_app", "--factory", "--no-access-log", "--host", address]
        self.api = self._process(Process, "api", ["-m", *command, "--port", self._url.rpartition(":")[2]])

    def _process(
        self, kind: type[Any], name: str, arguments: list[str], home: Path | None = None, **options: Any
    ) -> Any:
        home = home or self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        environment = self._environment | {"DEFEAT_HOME": str(home)}
        return kind([sys.executable, *arguments], self.folder / f"{name}.log", environment, **options)

    def start(self) -> Client:
        """Start everything except workers, and return a client with a key."""
        self.broker.start()
        upgrade(self.postgres.url)
        self.database = Database(self.postgres.url)
        with self.database.write() as session:
            settings = Settings(_env_file=None, home=self.folder, secret=self._environment["DEFEAT_SECRET"])
            key = first_key(session, settings) or create_key(session, settings, DEFAULT_TENANT, "tests")[1]
        self.api.start()
        until(self._ready, within_s=START_S, what="the API")
        return Client(self._url, key)

    def _ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self._url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def answer(self, path: str) -> int:
        """Return the status of the API's response to a request without a key."""
        try:
            with urllib.request.urlopen(f"{self._url}{path}", timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)

    def worker(
        self, name: str, *, clock_s: float = 0.0, home: Path | None = None, prefix: Sequence[str] = ()
    ) -> Worker:
        """Start a worker for all queues, with its clock `clock_s` seconds ahead and its files in `home`."""
        module = ["-m", "tests.faults.skewed_worker", str(clock_s)] if clock_s else ["-m", "worker"]
        worker: Worker = self._process(Worker, name, [*module, "--name", name], home=home, prefix=prefix)
        worker.start()
        self.workers[name] = worker
        return worker

    def end_workers(self) -> None:
        """Stop every worker with SIGTERM."""
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()

    def flush_broker(self) -> None:
        """Kill the broker, delete its messages, and restart it."""
        self.broker.kill()
        shutil.rmtree(self._broker_directory)
        self._broker_directory.mkdir()
        self.broker.start()

    def runs(self) -> list[tuple[str, int]]:
        """Return job and attempt of every run that is alive, of all workers."""
        found = {}
        for process in psutil.process_iter(["cmdline", "ppid"]):
            command = process.info["cmdline"] or []
            if "defeat.engine.run" in command and str(self.folder) in command[-1]:
                job, _, attempt = Path(command[-1]).name.partition("-")
                found[process.pid] = process.info["ppid"], (job, int(attempt))
        # A child of a run has the run's command line until it executes another program: torch's import runs `ldconfig`.
        return [run for parent, run in found.values() if parent not in found]

    def logs(self) -> str:
        """Return the end of every log, for the report of a failed test."""
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        """Kill everything."""
        for process in (*self.workers.values(), self.api, self.broker):
            process.kill()
        self._s3.kill()
        self._s3.communicate()
        if hasattr(self, "database"):
            self.database.dispose()


@contextmanager
def cluster(folder: Path, address: str = ADDRESS) -> Iterator[Cluster]:
    """Yield a cluster that is not started, and kill it afterwards. Raises `NoPostgres`."""
    with postgres.local(address) as server:
        made = Cluster(folder, server, address)
        try:
            yield made
        finally:
            made.stop()
