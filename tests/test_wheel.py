"""The wheel: it holds `defeat` alone, and runs with nothing but the packages of the base install."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

# What a client must never wait for, nor need.
HEAVY = ("torch", "torchvision", "timm", "numpy", "fastapi", "starlette", "sqlalchemy", "alembic", "celery", "redis")
SERVICE = ("app", "worker", "migrations", "tests", "examples", "benchmarks")


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".")
    [made] = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def base(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that the wheel asks for without an extra, from this environment, and no others."""
    folder = tmp_path_factory.mktemp("base")
    [project] = importlib.metadata.distributions(path=[str(installed)])
    waiting, seen = [Requirement(text) for text in project.requires or ()], set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            if (requirement.name, extra) in seen or (
                requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
            ):
                continue
            seen.add((requirement.name, extra))
            found = importlib.metadata.distribution(requirement.name)
            for file in found.files or ():
                link = folder / file.parts[0]
                if file.parts[0] not in {"..", "__pycache__"} and not link.exists():
                    link.symlink_to(Path(str(found.locate_file(file.parts[0]))))
            needed = [Requirement(text) for text in found.requires or ()]
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return folder


def run(code: str, *paths: Path) -> str:
    """Run code where only these folders and the standard library can be imported, and return what it prints."""
    code = f"import sys; sys.path += {[str(path) for path in paths]}; {code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_one_package_and_its_command(wheel: Path, installed: Path) -> None:
    [metadata] = [path.name for path in installed.glob("*.dist-info")]
    assert {path.name for path in installed.iterdir()} == {"defeat", metadata, "bin"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["defeat"]
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("defeat/")}
    assert "defeat/py.typed" in held
    files = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "defeat").rglob("*") if path.is_file()}
    assert held == {path.as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_client_needs_the_base_install_alone(installed: Path, base: Path) -> None:
    code = f"from defeat import Client; import defeat.cli.main; print([n for n in {HEAVY} if n in sys.modules])"
    assert run(code, installed, base).strip() == "[]"
    code = f"from importlib.util import find_spec; print([name for name in {HEAVY + SERVICE} if find_spec(name)])"
    assert run(code, installed, base).strip() == "[]", "or the test before shows nothing"


def test_its_command_answers(installed: Path, base: Path) -> None:
    code = (
        "from importlib.metadata import entry_points; sys.argv = ['defeat', '--help'];"
        "[command] = entry_points(group='console_scripts', name='defeat'); command.load()()"
    )
    shown = run(code, installed, base)
    assert "Usage: defeat" in shown
    assert "jobs" in shown
