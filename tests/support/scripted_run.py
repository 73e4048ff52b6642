"""A run that executes the `script` in its spec: a list of steps, each a list of a name and arguments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from defeat.engine.report import Reporter, RunError

POLL_S = 0.01


def _until_told(reporter: Reporter) -> None:
    while not reporter.cancelled:
        time.sleep(POLL_S)


class Steps:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reporter = Reporter(directory)
        self.reporter.listen_for_cancel()

    def event(self, name: str, *args: Any) -> None:
        *positional, named = args
        getattr(self.reporter, name)(*positional, **named)

    def raw(self, text: str) -> None:
        """Write the text unchanged; `<NUL>` becomes that character, which PostgreSQL rejects in a job's spec."""
        with (self.directory / "events.jsonl").open("a") as file:
            file.write(text.replace("<NUL>", "\0"))

    def artifact(self, name: str, kind: str, text: str, details: dict[str, Any]) -> None:
        path = self.reporter.artifact(name, kind=kind, content_type="text/plain", details=details)
        path.write_text(text)

    def checkpoint(self, name: str, text: str) -> None:
        path = self.directory / "checkpoints" / name
        path.write_text(text)
        self.reporter.checkpoint(path)

    def print(self, text: str) -> None:
        print(text)

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def copy(self, name: str, path: str) -> None:
        Path(path).write_text((self.directory / name).read_text())

    def link(self, name: str, target: str) -> None:
        self.reporter.artifact(name, kind="log", content_type="text/plain").symlink_to(target)

    def touch(self, path: str) -> None:
        Path(path).touch()

    def wait_for(self, path: str) -> None:
        while not Path(path).exists():
            time.sleep(POLL_S)

    def until_told(self) -> None:
        _until_told(self.reporter)

    def ignore_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def copy_request(self, name: str) -> None:
        """Leave the run's request as an artifact."""
        path = self.reporter.artifact(name, kind="log", content_type="application/json")
        path.write_text((self.directory / "run.json").read_text())

    def helper(self, path: str) -> None:
        """Leave a process of the same group behind, with its id in `path`."""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(path).write_text(str(child.pid))

    def environment(self, name: str) -> None:
        self.write(name, json.dumps(dict(os.environ)))

    def kill(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def exit(self, code: int) -> None:
        os._exit(code)

    def sleep_forever(self) -> None:
        while True:
            time.sleep(60)

    def finish(self, status: str, results: dict[str, Any]) -> None:
        self.reporter.finish(status, results=results)  # type: ignore[arg-type]

    def fail(self, failure_class: str, code: str, detail: str) -> None:
        self.reporter.finish("failed", failure=RunError(failure_class, code, detail))  # type: ignore[arg-type]


def main() -> None:
    directory = Path(sys.argv[1])
    request = json.loads((directory / "run.json").read_text())
    steps = Steps(directory)
    for name, *args in request["spec"]["script"]:
        getattr(steps, name)(*args)


if __name__ == "__main__":
    main()
