"""The locks hold what pyproject.toml asks for on every Python, and make finds a Python and does what its help says."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# The extras that each file of requirements/ is resolved for.
LOCKS = {"app": ("app", "traces"), "worker": ("worker", "traces"), "dev": ("dev",)}


class Pin(NamedTuple):
    requirement: Requirement
    hashes: frozenset[str]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        [specifier] = self.requirement.specifier
        assert specifier.operator == "==", self.requirement
        return specifier.version


def pins_of(lock: str) -> list[Pin]:
    text = (REPOSITORY / "requirements" / f"{lock}.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [Pin(Requirement(line.split(" --")[0]), frozenset(re.findall(r"--hash=(\S+)", line))) for line in lines]


def environment(python: str, extra: str = "") -> dict[str, str]:
    """Return the values of markers for the oldest release of a Python on Linux."""
    own = {name: str(value) for name, value in default_environment().items()}
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    return own | linux | {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}


def installed(lock: str, python: str) -> dict[str, Pin]:
    """Return what pip takes from a lock on a Python, by name; a name must not occur twice."""
    given = environment(python)
    taken = [pin for pin in pins_of(lock) if pin.requirement.marker is None or pin.requirement.marker.evaluate(given)]
    assert len({pin.name for pin in taken}) == len(taken), "pip refuses two versions of one package"
    return {pin.name: pin for pin in taken}


def asked(extras: tuple[str, ...]) -> Iterator[Requirement]:
    """Yield what the project itself asks for: its base, the extras and those they name, and the build backend."""
    listed = PROJECT["build-system"]["requires"] + PROJECT["project"]["dependencies"]
    for extra in extras:
        listed += PROJECT["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, listed):
        if requirement.name == PROJECT["project"]["name"]:
            yield from asked(tuple(sorted(requirement.extras)))
        else:
            yield requirement


# ---- the locks ----


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_what_the_project_asks_for(lock: str, python: str) -> None:
    pins, given = installed(lock, python), environment(python)
    wanted = [found for found in asked(LOCKS[lock]) if found.marker is None or found.marker.evaluate(given)]
    assert len(wanted) > 20
    for requirement in wanted:
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.version, prereleases=True), requirement


def test_every_pin_has_hashes_and_no_lock_names_a_registry() -> None:
    for lock in LOCKS:
        assert all(pin.hashes and all(re.fullmatch(r"sha256:\w{64}", h) for h in pin.hashes) for pin in pins_of(lock))
        text = (REPOSITORY / "requirements" / f"{lock}.txt").read_text()
        assert "://" not in text
        assert not re.search(r"^\s*-", re.sub(r"^ +--hash=.*$", "", text, flags=re.MULTILINE), re.MULTILINE), "options"
    assert {path.stem for path in (REPOSITORY / "requirements").iterdir()} == set(LOCKS)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_images_install_what_is_tested(python: str) -> None:
    tested = installed("dev", python)
    for lock in ("app", "worker"):
        for name, pin in installed(lock, python).items():
            assert (pin.version, pin.hashes) == (tested[name].version, tested[name].hashes), name
    assert not {"torch", "numpy"} & installed("app", python).keys()
    assert not {"pytest", "uv"} & installed("worker", python).keys()


def test_the_environment_of_the_tests_is_the_locks() -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name, pin in installed("dev", python).items():
        if pin.requirement.marker is None:
            assert importlib.metadata.version(name) == pin.version, f"{name}: run make setup"


def test_the_build_backend_is_pinned_once() -> None:
    assert PROJECT["dependency-groups"]["build"] == PROJECT["build-system"]["requires"]


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_has_a_wheel_and_all_fit_together(python: str, machine: str, tmp_path: Path) -> None:
    """Asks the registry for metadata only; a wheel that is missing, or that no hash names, is an error."""
    uv = [Path(sys.executable).parent / "uv", "pip", "install", "--dry-run", "--no-build", "--require-hashes"]
    target = ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_28", "--target", tmp_path / "t"]
    lock = ["--requirement", REPOSITORY / "requirements" / "dev.txt"]
    done = subprocess.run([*uv, *target, *lock], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stderr


@pytest.mark.slow
def test_the_locks_are_as_make_lock_writes_them(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "requirements", tmp_path / "requirements")
    make("lock", cwd=tmp_path)
    for lock in LOCKS:
        written = (tmp_path / "requirements" / f"{lock}.txt").read_text()
        assert written == (REPOSITORY / "requirements" / f"{lock}.txt").read_text(), "run make lock"


# ---- make ----


def make(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run make elsewhere with this environment's tools, without installing."""
    command = ["make", "--old-file", ".venv/.installed", f"BIN={Path(sys.executable).parent}", *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)


class Pythons:
    """A PATH with nothing on it but interpreters that say which version they are, and an empty checkout."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log, self.checkout = folder / "bin", folder / "log", folder / "checkout"
        self.bin.mkdir()
        (self.checkout / "requirements").mkdir(parents=True)
        for name in ("pyproject.toml", "requirements/dev.txt"):
            (self.checkout / name).touch()
        shutil.copy(REPOSITORY / "Makefile", self.checkout)

    def add(self, name: str, version: tuple[int, int], before: str = "") -> None:
        code = (
            f"#!{sys.executable}\nimport sys\n{before}\n"
            f"if sys.argv[1] == '-c':\n    sys.version_info = {(*version, 0)}\n    exec(sys.argv[2])\n    sys.exit()\n"
            f"open({str(self.log)!r}, 'w').write(' '.join(['{name}', *sys.argv[1:]]))\nsys.exit(1)\n"
        )
        (self.bin / name).write_text(code)
        (self.bin / name).chmod(0o755)

    def setup(self, *arguments: str) -> tuple[str, str]:
        """Run `make setup`; return how the interpreter that it took was called, and what it wrote to stderr."""
        make = shutil.which("make")
        assert make
        command = [make, "setup", *arguments]
        done = subprocess.run(command, cwd=self.checkout, env={"PATH": str(self.bin)}, capture_output=True, text=True)
        assert done.returncode != 0
        return (self.log.read_text() if self.log.exists() else "", done.stderr)


@pytest.fixture
def pythons(tmp_path: Path) -> Pythons:
    return Pythons(tmp_path)


def test_setup_takes_the_newest_python_that_can_make_an_environment(pythons: Pythons) -> None:
    pythons.add("python3.14", (3, 14), "sys.exit(127)  # as a version manager's shim for a version that is not active")
    pythons.add("python3.13", (3, 13), "sys.modules['ensurepip'] = None  # as Debian without python3-venv")
    pythons.add("python3.12", (3, 12))
    pythons.add("python3.11", (3, 11))
    pythons.add("python3", (3, 11))
    assert pythons.setup()[0] == "python3.12 -m venv --clear .venv"


@pytest.mark.parametrize(("version", "fits"), [((3, 10), False), ((3, 11), True), ((3, 14), True), ((3, 15), False)])
def test_setup_takes_python3_where_the_project_supports_it(
    pythons: Pythons, version: tuple[int, int], fits: bool
) -> None:
    pythons.add("python3", version)
    called, error = pythons.setup()
    assert called == ("python3 -m venv --clear .venv" if fits else "")
    assert ("No Python 3.11, 3.12, 3.13 or 3.14" in error) is not fits
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert supported.contains(".".join(map(str, version))) is fits


def test_setup_says_what_to_install(pythons: Pythons) -> None:
    for arguments in ((), ("PYTHON=/nowhere/python3",)):
        called, error = pythons.setup(*arguments)
        assert called == ""
        assert "apt-get install python3 python3-venv" in error
        assert "make setup PYTHON=" in error


def test_one_path_is_tested_without_the_linters() -> None:
    alone = make("--dry-run", "test", "T=tests/test_install.py", cwd=REPOSITORY).stdout
    assert "pytest tests/test_install.py" in alone
    assert "ruff" not in alone
    assert "ruff" in make("--dry-run", "test", cwd=REPOSITORY).stdout


def test_a_migration_is_written_with_the_next_number(tmp_path: Path) -> None:
    for name in ("app", "migrations"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "alembic.ini"):
        shutil.copy(REPOSITORY / name, tmp_path)
    with (tmp_path / "app" / "models.py").open("a") as models:
        models.write(
            '\n\nclass Colour(Base):\n    """A table."""\n\n    __tablename__ = "colours"\n'
            "    id: Mapped[str] = mapped_column(primary_key=True)\n"
        )
    before = sorted(path.stem for path in (tmp_path / "migrations" / "versions").glob("[0-9]*.py"))
    make("migration", "M=Add the colour's table!", cwd=tmp_path)
    [made] = {path.stem for path in (tmp_path / "migrations" / "versions").glob("[0-9]*.py")} - set(before)
    assert made == f"{int(before[-1][:4]) + 1:04d}_add_the_colour_s_table"
    text = (tmp_path / "migrations" / "versions" / f"{made}.py").read_text()
    assert text.startswith('"""Add the colour\'s table!\n')
    assert f'revision = "{made}"\ndown_revision = "{before[-1]}"\n' in text
    changes = re.findall(r"\bop\.([a-z]\w+)\(\s*(\S+?)[,)]", text)
    assert changes == [("create_table", '"colours"'), ("drop_table", '"colours"')], "and nothing else"


def test_every_tool_breaks_lines_at_the_same_length() -> None:
    [length] = re.findall(r"^max_line_length = (\d+)$", (REPOSITORY / ".editorconfig").read_text(), re.MULTILINE)
    assert {int(length)} == {PROJECT["tool"]["ruff"]["line-length"], PROJECT["tool"]["rumdl"]["line-length"]}
