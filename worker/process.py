"""The process of one run: starts it in a session of its own, waits for it, and ends it with all its children."""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from app.stack.processes import dies_with_parent
from defeat.engine.report import RunError
from worker.hardware import memory_kills

RUN_COMMAND: Final = (sys.executable, "-m", "defeat.engine.run")
HOST_OUT_OF_MEMORY: Final = "host_out_of_memory"
"""The code of the failure of a run that the kernel killed for memory."""

_LEAST_ROOM_BYTES: Final = 1024 * 1024

# A run opens files from strangers, so it gets none of the service's secrets; OTEL_EXPORTER_OTLP_HEADERS is one.
_SECRET_NAMES = ("DATABASE_URL", "REDIS_URL", "STORAGE_URL")
_SECRET_PREFIXES = ("DEFEAT_", "AWS_", "CELERY_", "OTEL_")
# Names of modules that a run imports: no secret, and without it the run does not know their detectors and methods.
_PASSED_ON = frozenset({"DEFEAT_PLUGINS"})


def run_environment() -> dict[str, str]:
    """Return this process's environment without the service's settings and credentials."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or (name not in _SECRET_NAMES and not name.startswith(_SECRET_PREFIXES))
    }
    return kept | {"PYTHONUNBUFFERED": "1"}


class RunProcess:
    """A run, started as `command + [directory]` in its own session; it ends when this process ends.

    Its output goes to `log`. Start it from the main thread: see `app.stack.processes.dies_with_parent`.
    """

    def __init__(self, command: Sequence[str], directory: Path, *, log: Path) -> None:
        self._directory = directory
        self._kills_before = memory_kills()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=run_environment(),
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )
        self._ended = _descriptor(self._process.pid)

    @property
    def pid(self) -> int:
        """The process's id, which is its group's id too."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end; return the exit code (negative: the signal's number), or None if the run has not ended."""
        # Popen's own wait polls twenty times a second, for days; a descriptor of the process wakes this one once.
        if self._ended is not None:
            ended = select.poll()
            ended.register(self._ended, select.POLLIN)
            ended.poll(timeout_s * 1000)
            return self._process.poll()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def death(self, code: int) -> RunError:
        """Return the failure of a run that left no result; call it soon after `wait` has returned the exit code.

        The kernel counts a kill for memory before it kills, so the count has changed by then.
        """
        if code > 0 and shutil.disk_usage(self._directory).free < _LEAST_ROOM_BYTES:
            # The run could not even write its result.
            detail = f"{_in_words(code)}; the disk of its worker's scratch directory is full: free some space"
            return RunError("infra", "disk_full", detail)
        kills = memory_kills()
        if -code != signal.SIGKILL or self._kills_before is None or kills is None:
            return RunError("infra", "run_died", _in_words(code))
        if kills <= self._kills_before:
            by = "by a person or a program and not by the kernel for memory"
            return RunError("infra", "run_died", f"the run was killed by SIGKILL, {by}, and left no result")
        detail = (
            "the kernel killed the run because the memory of the machine, or of the worker's limit, was exhausted; "
            "give the worker more memory, or make the run need less"
        )
        return RunError("oom", HOST_OUT_OF_MEMORY, detail)

    def terminate(self) -> None:
        """Send SIGTERM, on which the run saves and ends. The run ends its own children."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the run and all its children that are alive."""
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._ended is not None:
            os.close(self._ended)
            self._ended = None


def _descriptor(pid: int) -> int | None:
    """Return a descriptor that is readable once the process has ended; None on systems without them (not Linux)."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old kernel, or a sandbox that forbids it
        return None


def _in_words(code: int) -> str:
    if code >= 0:
        return f"the run ended with exit code {code} and left no result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the machine was probably out of memory" if -code == signal.SIGKILL else ""
    return f"the run was killed by {name} and left no result{hint}"
