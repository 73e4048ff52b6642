"""Child processes that end again and again."""

import os
import sys
from pathlib import Path

import pytest

from app.stack.process_manager import ManagedProcess, ProcessFailed
from tests.support.waiting import until


def test_a_process_that_keeps_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "print('no such thing'); raise SystemExit(5)"]
    process = ManagedProcess("api", command, environment=dict(os.environ), log_path=tmp_path / "api.log")
    process.start()

    def _poll() -> bool:
        process.poll()
        return False

    with pytest.raises(ProcessFailed, match=r"(?s)api ended 3 times .* code 5.*no such thing"):
        until(_poll)
