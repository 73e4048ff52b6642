"""The images' install steps, in a fresh virtual environment; what the Dockerfile takes from the sources is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text()
COPIED = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().split("\n")
    assert {line[1:] for line in ignored if line.startswith("!")} == COPIED
    assert all((REPOSITORY / name).exists() for name in COPIED)


def test_no_image_runs_as_root_or_names_a_registry() -> None:
    for base in re.findall(r"^FROM (\S+) AS", DOCKERFILE, re.MULTILINE):
        assert "/" not in base, base
    for target in ("worker", "api"):
        final = re.split(r"^FROM ", DOCKERFILE.split(f"FROM base AS {target}\n")[1], flags=re.MULTILINE)[0]
        assert re.findall(r"^USER (.*)$", final, re.MULTILINE) == ["10001:10001"]


def test_the_workers_image_can_compile() -> None:
    """A slim image has no C compiler, and Triton fails without one at a training's first step."""
    worker = DOCKERFILE.split("FROM base AS worker\n")[1].split("USER 10001")[0]
    assert re.search(r"apt-get install .*\bgcc\b.*\blibc6-dev\b", worker)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "torch"), [("api", False), ("worker", True)])
def test_the_install_steps_of_an_image(target: str, torch: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in COPIED:
        subprocess.run(["cp", "-r", REPOSITORY / name, source], check=True)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    stage = DOCKERFILE.split(f" AS build-{target}\n")[1]
    step = re.match(r"RUN /opt/defeat/bin/pip (.*)\n", stage)
    assert step, "the install step is one call of pip"
    arguments = step[1].replace("'", "").split()
    subprocess.run([venv / "bin" / "pip", *arguments], cwd=source, check=True, timeout=1800)

    def _python(code: str) -> str:
        # From elsewhere, so that the installed packages are imported.
        command = [venv / "bin" / "python", "-c", code]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert _python("import app.main, app.migrate, app.ops.doctor, app.keys; print(app.main.__file__)").startswith(
        str(venv)
    )
    assert _python("from importlib.util import find_spec; print(bool(find_spec('torch')))").strip() == str(torch)
    migrated = f"import app.migrate as m; m.upgrade('sqlite:///{tmp_path}/db.sqlite3')"
    assert _python(migrated) == ""
    if torch:
        _python("import worker.main, defeat.engine.run, defeat.engine.training.distill")
