"""The images' install steps, in a fresh virtual environment; what the Dockerfile takes from the sources is there."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.conftest import REPOSITORY

DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text()
COPIED = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}

[PYTHON] = re.findall(r"^FROM python:([\d.]+)-", DOCKERFILE, re.MULTILINE)
# The lock that each image installs.
IMAGES = {"app": "api", "worker": "worker"}


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


def test_the_images_python_is_one_that_the_project_supports() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(PYTHON)


def steps(target: str) -> list[str]:
    """Return the lines that make what an image installs."""
    return DOCKERFILE.split(f"FROM build AS build-{target}\n")[1].split("\n\n")[0].splitlines()


@pytest.mark.parametrize("lock", IMAGES)
def test_an_image_installs_its_lock_with_hashes_and_then_the_sources_alone(lock: str) -> None:
    installs = [line.split(" install ")[1] for line in steps(IMAGES[lock]) if " install " in line]
    assert installs == [
        "--require-hashes --requirement /tmp/requirements.txt",
        "--no-deps --no-build-isolation --editable .",
    ]
    assert steps(IMAGES[lock])[0] == f"COPY requirements/{lock}.txt /tmp/requirements.txt"


def interpreter() -> str:
    """Return the images' Python where this machine has it, else the one that runs the tests."""
    found = shutil.which(f"python{PYTHON}")
    usable = found and subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0
    return found if found and usable else sys.executable


@pytest.mark.slow
@pytest.mark.parametrize(("target", "torch"), [("api", False), ("worker", True)])
def test_the_install_steps_of_an_image(target: str, torch: bool, tmp_path: Path) -> None:
    source, venv, lock = tmp_path / "source", tmp_path / "venv", tmp_path / "requirements.txt"
    source.mkdir()
    subprocess.run([interpreter(), "-m", "venv", venv], check=True)
    for line in steps(target):
        match line.split():
            case ["COPY", "--from=source", "/", "."]:
                for name in COPIED:
                    if "/" not in name:
                        subprocess.run(["cp", "-r", REPOSITORY / name, source], check=True)
            case ["COPY", name, "/tmp/requirements.txt"]:
                shutil.copy(REPOSITORY / name, lock)
            case ["RUN", program, *arguments]:
                command = [program.replace("/opt/defeat", str(venv)), *arguments]
                command = [word.replace("/tmp/requirements.txt", str(lock)) for word in command]
                subprocess.run(command, cwd=source, check=True, timeout=1800)
            case _:
                pytest.fail(f"a step that this test does not know: {line}")

    def _python(code: str) -> str:
        # From elsewhere, so that what is installed is imported.
        command = [venv / "bin" / "python", "-c", code]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    imported = "import app.main, app.migrate, app.ops.doctor, app.keys; print(app.main.__file__)"
    assert _python(imported).strip() == str(source / "app" / "main.py")
    assert list((source / "app" / "__pycache__").glob("main.*.pyc"))
    assert _python("from importlib.util import find_spec; print(bool(find_spec('torch')))").strip() == str(torch)
    database = f"sqlite:///{tmp_path}/db.sqlite3"
    migrated = [venv / "bin" / "defeat", "admin", "migrate"]
    subprocess.run(migrated, cwd=tmp_path, check=True, env=os.environ | {"DATABASE_URL": database})
    assert (tmp_path / "db.sqlite3").stat().st_size > 0
    if torch:
        _python("import worker.main, defeat.engine.run, defeat.engine.training.distill")
