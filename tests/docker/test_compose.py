"""docker-compose.yml: it is one, guards its secrets, and its commands run as they stand against such services."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from app.settings import Settings
from app.stack.processes import dies_with_parent
from tests.app.queue.test_messages import _broker
from tests.conftest import REPOSITORY
from tests.support.waiting import until

COMPOSE = REPOSITORY / "docker-compose.yml"
DOCUMENT: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
OURS = {"migrate", "api", "worker-jobs", "worker-checks", "worker-gpu"}
EXAMPLE = dict(re.findall(r"^(\w+)=(.*)$", (REPOSITORY / ".env.example").read_text(), re.MULTILINE))
AWS = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"}
DEADLINE_S = 60.0


def test_it_is_a_compose_file() -> None:
    filled = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: EXAMPLE[found[1]] or "0a1b", COMPOSE.read_text())
    merged = yaml.safe_dump(yaml.safe_load(filled))
    assert set(compose_spec.PyCompose.from_yaml(merged).service_names()) == set(SERVICES)


def test_every_variable_is_in_the_example_and_no_secret_has_a_default() -> None:
    used = re.findall(r"\$\{(\w+)(:?[-?][^}]*)?\}", COMPOSE.read_text())
    assert {name for name, _ in used} == set(EXAMPLE)
    secrets = {name for name in EXAMPLE if name != "DEFEAT_PUBLISH"}
    assert all(EXAMPLE[name] == "" for name in secrets)
    for name in secrets:
        assert f"${{{name}:?" in COMPOSE.read_text(), f"an empty {name} would start"
    assert not [name for name, rest in used if name in secrets and rest.startswith(":-")]


def test_images_are_pinned_and_nothing_listens_in_the_open() -> None:
    for name, service in SERVICES.items():
        assert name in OURS or re.search(r":v?\d", service["image"]), name
        for port in service.get("ports", []):
            assert port.startswith(("127.0.0.1:", "${DEFEAT_PUBLISH:-127.0.0.1:")), name
    assert EXAMPLE["DEFEAT_PUBLISH"].startswith("127.0.0.1:")


def test_every_container_is_read_only_and_ours_have_no_capability() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if name in OURS:
            assert service["cap_drop"] == ["ALL"], name
            assert "user" not in service, "the image's own"


def test_workers_get_the_time_that_a_hand_back_takes() -> None:
    for name in OURS:
        if name.startswith("worker"):
            assert SERVICES[name]["stop_grace_period"] == f"{Settings().cancel_grace_s + 20:.0f}s"


# ---- the commands, by hand ----


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Image:
    """What the Dockerfile says of one target: its command and its health check."""

    def __init__(self, target: str) -> None:
        text = (REPOSITORY / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
        stage = re.split(rf"^FROM \w+ AS {target}$", text, flags=re.MULTILINE)[1].split("\nFROM ")[0]
        commands = re.findall(r"^(CMD|HEALTHCHECK.*?CMD) (\[.*\])$", stage, re.MULTILINE)
        self.health, self.command = (yaml.safe_load(command) for _, command in commands)


def resolved(service: dict[str, Any], replaced: dict[str, str]) -> dict[str, str]:
    """Return the service's environment with what the test has in place of its services."""
    assert replaced.keys() - {"DEFEAT_HOME", "DEFEAT_METRICS_PORT", "PATH"} <= service["environment"].keys()
    return {name: str(value) for name, value in service["environment"].items() if value is not None} | replaced


@pytest.fixture
def services(empty_postgres_url: str, s3_url: str) -> Iterator[dict[str, str]]:
    """The variables that lead to a PostgreSQL, a broker and an S3 server, with nothing of ours in them yet."""
    with tempfile.TemporaryDirectory(prefix="q") as folder:
        broker = Path(folder) / "b.sock"
        with _broker(broker):
            aws = {name: value for name, value in os.environ.items() if name in AWS}
            urls = {"DATABASE_URL": empty_postgres_url, "REDIS_URL": f"redis+socket://{broker}", "STORAGE_URL": s3_url}
            yield aws | urls | {"DEFEAT_SECRET": "a secret for tests only"}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_the_commands_run_by_hand(services: dict[str, str], tmp_path: Path) -> None:
    http, processes = free_port(), []
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def _command(command: list[str], metrics: int) -> list[str]:
        changed = {"0.0.0.0": "127.0.0.1", "8765": str(http), "python": sys.executable}
        if command[0] == "uvicorn":
            command = ["python", "-m", *command]
        return [
            changed.get(word, word).replace(":8765", f":{http}").replace(":9100", f":{metrics}") for word in command
        ]

    def _environment(name: str, metrics: int) -> dict[str, str]:
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        return resolved(
            SERVICES[name], services | path | {"DEFEAT_HOME": str(home), "DEFEAT_METRICS_PORT": str(metrics)}
        )

    def _run(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)

    migrated = _run(_command(SERVICES["migrate"]["command"], 0), _environment("migrate", 9100))
    assert migrated.returncode == 0, migrated.stderr
    ports = {name: free_port() for name in ("api", "worker-jobs", "worker-checks")}
    try:
        for name, port in ports.items():
            command = SERVICES[name].get("command") or Image("api").command
            with (tmp_path / f"{name}.log").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        _command(command, port), env=_environment(name, port), stdout=output, stderr=output,
                        preexec_fn=dies_with_parent(),
                    )
                )  # fmt: skip
        until(lambda: answers(f"http://127.0.0.1:{http}/readyz"))
        for name, port in ports.items():
            until(lambda port=port: answers(f"http://127.0.0.1:{port}/metrics"))
            health = Image("api" if name == "api" else "worker").health
            assert _run(_command(health, port), dict(os.environ)).returncode == 0
        doctor = _run([sys.executable, "-m", "app.ops.doctor"], _environment("api", 9100))
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait(DEADLINE_S) for process in processes]
    # uvicorn ends in order, and then of the signal that it got.
    assert codes == [-signal.SIGTERM, 0, 0], [(tmp_path / f"{name}.log").read_text()[-2000:] for name in ports]
    health = _run(_command(Image("api").health, ports["api"]), dict(os.environ))
    assert health.returncode != 0, "a health check that is always well"
