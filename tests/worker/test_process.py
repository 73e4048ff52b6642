import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from worker import process as module
from worker.process import RunProcess, run_environment

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture(params=["descriptor", "refused", "missing"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with process descriptors, one that refuses them, one without them."""

    def _refuse(_pid: int) -> int:
        raise PermissionError

    if request.param == "refused":
        monkeypatch.setattr(os, "pidfd_open", _refuse)
    elif request.param == "missing":
        monkeypatch.delattr(os, "pidfd_open")


@pytest.mark.usefixtures("system")
def test_waiting_sees_the_end_and_the_code(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"import os, sys, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nsys.exit(3)"
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    process = RunProcess([sys.executable, "-c", code], tmp_path, log=tmp_path / "log.txt")
    assert process.wait(0.01) is None
    go.touch()
    assert process.wait(20) == 3
    assert process.wait(20) == 3
    process.kill()
    process.kill()
    assert process.wait(0) == 3
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.usefixtures("system")
def test_a_killed_run_is_seen_at_once(tmp_path: Path) -> None:
    process = RunProcess(SLEEP, tmp_path, log=tmp_path / "log.txt")
    process.kill()
    assert process.wait(20) == -9


@pytest.mark.parametrize(("free", "code"), [(0, "disk_full"), (2**30, "run_died")])
def test_a_run_that_had_no_room_to_say_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, code: str
) -> None:
    process = RunProcess([sys.executable, "-c", "raise SystemExit(1)"], tmp_path, log=tmp_path / "log.txt")
    assert process.wait(20) == 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    failure = process.death(1)
    assert (failure.failure_class, failure.code) == ("infra", code)
    assert failure.detail.startswith("the run ended with exit code 1 and left no result")
    process.kill()


PROBABLY = "the run was killed by SIGKILL and left no result; the machine was probably out of memory"
NOT_FOR_MEMORY = (
    "the run was killed by SIGKILL, by a person or a program and not by the kernel for memory, and left no result"
)
FOR_MEMORY = (
    "the kernel killed the run because the memory of the machine, or of the worker's limit, was exhausted; give the "
    "worker more memory, or make the run need less"
)
SEGFAULT = "the run was killed by SIGSEGV and left no result"


@pytest.mark.parametrize(
    ("number", "before", "after", "named"),
    [
        (signal.SIGKILL, 3, 4, ("oom", "host_out_of_memory", FOR_MEMORY)),
        (signal.SIGKILL, 3, 3, ("infra", "run_died", NOT_FOR_MEMORY)),
        (signal.SIGKILL, None, 4, ("infra", "run_died", PROBABLY)),
        (signal.SIGKILL, 3, None, ("infra", "run_died", PROBABLY)),
        (signal.SIGSEGV, 3, 4, ("infra", "run_died", SEGFAULT)),
    ],
)
def test_what_a_death_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, before: int | None, after: int | None, named: tuple
) -> None:
    kills = iter((before, after))
    monkeypatch.setattr(module, "memory_kills", lambda: next(kills))
    process = RunProcess(SLEEP, tmp_path, log=tmp_path / "log.txt")
    os.kill(process.pid, number)
    code = process.wait(20)
    process.kill()
    assert code == -number
    death = process.death(code)
    assert (death.failure_class, death.code, death.detail) == named


LIMIT_BYTES = 256 * 2**20
# The worker joins the group first, and the run inherits it, as in a container.
WORKER = """
import json, os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from worker.process import RunProcess
process = RunProcess([sys.executable, "-c", sys.argv[2]], Path(sys.argv[3]), log=Path(sys.argv[3], "log.txt"))
code = process.wait(60)
death = process.death(code)
process.kill()
print(json.dumps([code, death.failure_class, death.code]))
"""
EAT = "eaten = [bytes([1]) * 2**20 for _ in range(2000)]"
KILL = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group with a low memory limit, of the version that this machine has."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    old = (first / "memory.limit_in_bytes").exists()
    group = (first if old else second) / f"defeat-test-{secrets.token_hex(6)}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    with ExitStack() as cleaning:
        cleaning.callback(_remove, group)
        limits = {"memory.limit_in_bytes": LIMIT_BYTES, "memory.swappiness": 0}
        try:
            for name, value in (limits if old else {"memory.max": LIMIT_BYTES, "memory.swap.max": 0}).items():
                (group / name).write_text(str(value))
        except OSError as error:
            pytest.skip(f"no memory can be limited here: {error}")
        yield group


def _remove(group: Path) -> None:
    """Remove a group whose processes have ended; the kernel may notice their end with a delay."""
    until = time.monotonic() + 10
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


@pytest.mark.parametrize(("run", "named"), [(EAT, ["oom", "host_out_of_memory"]), (KILL, ["infra", "run_died"])])
def test_the_kernel_is_asked_who_killed_a_run(limited: Path, tmp_path: Path, run: str, named: list[str]) -> None:
    command = [sys.executable, "-c", WORKER, str(limited), run, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == [-signal.SIGKILL, *named]


def test_a_run_gets_none_of_the_services_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("DATABASE_URL", "DEFEAT_SECRET", "AWS_SECRET_ACCESS_KEY", "OTEL_EXPORTER_OTLP_HEADERS")
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    assert not run_environment().keys() & set(secrets)
