import os
import sys
from pathlib import Path

import pytest

from worker.process import RunProcess, run_environment


@pytest.fixture(params=["descriptor", "refused", "missing"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that gives descriptors of processes, one that refuses them, one that has none."""

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
    process = RunProcess([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path, log=tmp_path / "log.txt")
    process.kill()
    assert process.wait(20) == -9


def test_a_run_gets_none_of_the_services_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("DATABASE_URL", "DEFEAT_SECRET", "AWS_SECRET_ACCESS_KEY", "OTEL_EXPORTER_OTLP_HEADERS")
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    assert not run_environment().keys() & set(secrets)
