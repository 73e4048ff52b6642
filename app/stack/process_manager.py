"""Manages long-running child processes: starts them, restarts those that end, and stops them."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from app.stack.processes import dies_with_parent

log = structlog.get_logger(__name__)

MAX_DEATHS = 3
DEATHS_WITHIN_S = 60.0
_LOG_LINES = 15
_MAX_LOG_BYTES = 10 * 1024 * 1024


class ProcessFailed(Exception):
    """A process ends again and again. The message has its name, its log's path, and the log's last lines."""


class ManagedProcess:
    """One child process; it ends when this process ends, and its output goes to `log_path`.

    Call `start` and `poll` in the main thread: see `app.stack.processes.dies_with_parent`. The process has a session of
    its own, so that Ctrl-C in the terminal reaches only the parent, which stops its processes in order.
    """

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log_path: Path) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths: list[float] = []
        self._start_at = 0.0

    def start(self) -> None:
        """Start the process."""
        if self._log_path.exists() and self._log_path.stat().st_size > _MAX_LOG_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        with self._log_path.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )
        log.info("child_started", child=self.name, pid=self._process.pid)

    def poll(self) -> None:
        """Restart the process if it has ended, after a pause that doubles.

        Raises `ProcessFailed` at the third end within a minute.
        """
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self.start()
            return
        code = self._process.poll()
        if code is None:
            return
        self._process = None
        self._deaths = [*(death for death in self._deaths if now - death < DEATHS_WITHIN_S), now]
        log.warning("child_died", child=self.name, exit_code=code)
        if len(self._deaths) >= MAX_DEATHS:
            raise ProcessFailed(
                f"{self.name} ended {len(self._deaths)} times within a minute, the last time with code {code}. "
                f"Its log, {self._log_path}, ends with:\n{self.log_tail()}"
            )
        self._start_at = now + 0.5 * 2 ** len(self._deaths)

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        with self._log_path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def terminate(self) -> None:
        """Send SIGTERM to the process."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill the process; its own children end with it."""
        if self._process is not None:
            self._process.kill()

    @property
    def ended(self) -> bool:
        """Whether the process is not running."""
        return self._process is None or self._process.poll() is not None


def stop_all(processes: Sequence[ManagedProcess], *, within_s: float) -> None:
    """Send SIGTERM to all processes, and kill those that have not ended after `within_s` seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + within_s
    while not all(process.ended for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if not process.ended:
            log.warning("child_killed", child=process.name, after_s=within_s)
            process.kill()
    while not all(process.ended for process in processes):
        time.sleep(0.05)
