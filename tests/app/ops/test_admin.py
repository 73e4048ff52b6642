"""The old spellings of the operator's commands, which 0.2 still takes, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


def _python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEFEAT_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    for name in ("DATABASE_URL", "STORAGE_URL"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, env=environment, cwd=home, timeout=120
    )


def test_migrations_and_keys_through_the_command_itself(tmp_path: Path):
    command = ("-c", "from defeat.cli.main import main; main()", "admin")
    migrated = _python(*command, "migrate", home=tmp_path)
    assert (migrated.returncode, migrated.stdout) == (0, "the database is up to date\n")
    made = _python(*command, "keys", "--tenant", "a lab", "--name", "ci", home=tmp_path)
    assert (made.returncode, made.stdout[:3], made.stderr) == (0, "dk_", "")
    listed = _python(*command, "keys", "--list", home=tmp_path)
    assert listed.stdout.split("\t")[1:3] == ["a lab", "ci"]
    wrong = _python(*command, "keys", "--revoke", "key_none", home=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "there is no key 'key_none'" in wrong.stderr
    assert _python(*command, "keys", home=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("old", "arguments", "new", "code", "shown"),
    [
        ("app.migrate", [], "defeat admin migrate", 0, "the database is up to date"),
        ("app.keys", ["--list"], "defeat admin keys", 0, ""),
        ("app.keys", ["--revoke", "key_none"], "defeat admin keys", 1, ""),
        ("app.keys", [], "defeat admin keys", 2, ""),
        ("app.workers", ["--list"], "defeat admin workers", 0, ""),
        ("app.usage", [], "defeat admin usage", 0, ""),
        ("app.retention", ["--dry-run"], "defeat admin retention", 0, '{"dry_run": true'),
        ("app.doctor", ["--help"], "defeat doctor", 0, "--json"),
        ("worker.run", ["nowhere", "and more"], "python -m defeat.engine.run", 1, ""),
        ("worker.detect", ["--help"], "python -m defeat.engine.detect", 0, "--output"),
        ("worker.catalog", [], "python -m defeat.engine.catalog", 1, ""),
    ],
)
def test_old_spellings_warn_and_do_the_same(tmp_path: Path, old, arguments, new, code, shown):
    if old in ("app.keys", "app.workers", "app.usage", "app.retention"):
        assert _python("-m", "app.ops.admin", "migrate", home=tmp_path).returncode == 0
    done = _python("-m", old, *arguments, home=tmp_path)
    assert done.returncode == code, done.stderr
    assert shown in done.stdout
    warning = done.stderr.splitlines()[0]
    assert warning == f"warning: `python -m {old}` is deprecated and will be removed in 0.3; use `{new}`"
