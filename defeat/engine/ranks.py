"""The other processes of a run on several GPUs: rank 0 starts them, and they end with it.

torchrun would start them in sessions of their own, where the supervisor's kill does not reach them. Its environment
variables are kept (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`), and
`torchrun -m defeat.engine.run DIR` by hand does the same.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from defeat.engine.report import RunError

COMMAND = (sys.executable, "-m", "defeat.engine.run")
MEET = "RENDEZVOUS_FILE"
# How long rank 0 waits for the reason why another process failed, after its own exchange with it has failed.
FAILURE_WAIT_S = 20.0


def rank() -> int:
    """Return the number of this process among the run's, from 0."""
    return int(os.environ.get("RANK", "0"))


def home(directory: Path) -> Path:
    """Return the directory that this process writes into: for rank 0 the run directory itself."""
    if rank() == 0:
        return directory
    own = directory / f"rank-{rank()}"
    own.mkdir(exist_ok=True)
    return own


def die_with_the_first() -> None:
    """End this process when rank 0 ends, for whatever reason: the pipe between them closes then."""
    if rank() == 0 or MEET not in os.environ:
        return

    def _wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=_wait, daemon=True).start()


class Others:
    """The run's other processes, for use in rank 0."""

    def __init__(self, directory: Path, count: int) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        environment = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, MEET: directory / "rendezvous"}
        os.environ.update({name: str(value) for name, value in environment.items()} | {"RANK": "0", "LOCAL_RANK": "0"})
        # torch would otherwise warn in each log that it searches for unused parameters, which some jobs need.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        (directory / "rendezvous").unlink(missing_ok=True)
        for number in range(1, count):
            (directory / f"rank-{number}").mkdir(exist_ok=True)
            with (directory / f"rank-{number}" / "log.txt").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [*COMMAND, str(directory)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "RANK": str(number), "LOCAL_RANK": str(number)},
                    )
                )

    def watch(self, on_failure: Callable[[RunError], None]) -> None:
        """Call `on_failure`, in a thread, when one of them fails: this process may be waiting for it."""

        def _wait(number: int, process: subprocess.Popen[bytes]) -> None:
            if process.wait() not in (0, 3):
                on_failure(self._failure(number) or RunError("infra", "rank_died", f"process {number} of the run died"))

        for number, process in enumerate(self._processes, 1):
            threading.Thread(target=_wait, args=(number, process), daemon=True).start()

    def failure(self) -> RunError | None:
        """Return the failure that another process reports, after a short wait for one that is about to end."""
        found = None
        for number, process in enumerate(self._processes, 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(FAILURE_WAIT_S)
                found = found or self._failure(number)
        return found

    def _failure(self, number: int) -> RunError | None:
        path = self._directory / f"rank-{number}" / "result.json"
        failure = json.loads(path.read_text())["failure"] if path.exists() else None
        return failure and RunError(failure["class"], failure["code"], failure["detail"])

    def abandon(self) -> None:
        """End them at once, by closing the pipes that they read."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()

    def join(self) -> None:
        """Wait until they have ended."""
        for process in self._processes:
            process.wait()


@contextlib.contextmanager
def started(directory: Path, count: int) -> Iterator[Others | None]:
    """Start the other processes of a run of `count`, if this is rank 0 and there are any, and join them at the end."""
    if count == 1 or rank() or "WORLD_SIZE" in os.environ:
        yield None
        return
    others = Others(directory, count)
    try:
        yield others
    except BaseException:
        # Perhaps the failure could not be recorded, and they wait for this process.
        others.abandon()
        raise
    finally:
        others.join()
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", MEET, "RANK", "LOCAL_RANK"):
            del os.environ[name]
