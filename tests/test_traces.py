"""Traces as an operator gets them: the API and a worker as processes, OpenTelemetry's variables, a collector."""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `traces` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app.db import Database
from app.keys.service import create_key
from app.models import Dataset
from app.settings import Settings
from app.stack.embedded import broker_binary, broker_command
from app.stack.processes import dies_with_parent
from tests.support.waiting import until
from tests.support.worker_world import World

CALLERS_TRACE, CALLERS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """A collector of OTLP over HTTP on loopback: keeps every span, with the name of the service that sent it."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        collector = self

        class _Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.keep(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def keep(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            service = self._values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [self._plain(service, span) for span in scope.spans]

    @staticmethod
    def _plain(service: str, span: Any) -> dict[str, Any]:
        ids = {name: getattr(span, name).hex() for name in ("trace_id", "span_id", "parent_span_id")}
        links = [link.span_id.hex() for link in span.links]
        attributes = Collector._values(span.attributes)
        return {"service": service, "name": span.name, **ids, "attributes": attributes, "links": links}

    @staticmethod
    def _values(items: Any) -> dict[str, Any]:
        return {item.key: item.value.string_value or item.value.int_value for item in items}

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["name"] == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("t"))


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(world: World) -> Iterator[Start]:
    """Start a process in the world's environment, with a broker there; what is left of it is killed in the end."""
    processes: list[subprocess.Popen[bytes]] = []
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    (world.home / "data").mkdir()
    ours = {"DEFEAT_HOME": str(world.home), "DEFEAT_DATASET_ROOTS": json.dumps([str(world.home / "data")])}

    def _start(*command: str, **more: str) -> "subprocess.Popen[bytes]":
        with (world.home / f"{len(processes)}.log").open("ab") as output:
            processes.append(
                subprocess.Popen(
                    command, stdout=output, stderr=output, env=kept | ours | more, preexec_fn=dies_with_parent()
                )
            )
        return processes[-1]

    _start(*broker_command(broker_binary(), directory=world.home, socket_path=world.settings.broker_socket))
    until(world.settings.broker_socket.exists)
    yield _start
    for process in processes:
        process.kill()
        process.wait()


def start_api(start: Start, **environment: str) -> "tuple[str, subprocess.Popen[bytes]]":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ("-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port), "--no-access-log")
    process = start(sys.executable, *command, **environment)
    url = f"http://127.0.0.1:{port}"

    def _answers() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    until(_answers)
    return url, process


def start_worker(start: Start, **environment: str) -> "subprocess.Popen[bytes]":
    return start(sys.executable, "-m", "worker", "--queues", "checks", **environment)


def send_dataset(world: World, url: str, **headers: str) -> str:
    """Have the API make a dataset that a worker is to check, and return its id."""
    database = Database(world.settings.database_url)
    settings = Settings(home=world.home)
    with database.write() as session:
        _row, key = create_key(session, settings, "a team", "laptop")
    folder = world.home / "data" / "empty"
    folder.mkdir()
    body = {"name": "cells", "source": {"kind": "reference", "uri": folder.as_uri()}}
    answer = httpx2.post(f"{url}/v1/datasets", json=body, headers={"Authorization": f"Bearer {key}", **headers})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def log_lines(world: World) -> list[dict[str, Any]]:
    text = "".join(path.read_text() for path in world.home.glob("*.log"))
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_one_trace_from_the_request_to_the_workers_end(world: World, start: Start, collector: Collector) -> None:
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    url, api = start_api(start, **traced)
    worker = start_worker(start, **traced)
    headers = {"traceparent": f"00-{CALLERS_TRACE}-{CALLERS_SPAN}-01", "X-Request-Id": "my-request-1"}
    row_id = send_dataset(world, url, **headers)
    until(lambda: world.now(Dataset(id=row_id)).finished_at)  # there is nothing in it

    worker.terminate()  # nothing is exported before the end
    assert worker.wait(20) == 0
    api.terminate()
    api.wait(20)

    (request,), (sent,), (attempt,) = map(
        collector.named, ("POST /v1/datasets", "send worker.tasks.import_dataset", "dataset attempt")
    )
    assert {span["trace_id"] for span in collector.spans} == {CALLERS_TRACE}, "probes, beats and sweeps are in none"
    assert (request["service"], request["parent_span_id"]) == ("defeat-api", CALLERS_SPAN)
    assert request["attributes"]["defeat.request_id"] == "my-request-1"
    assert attempt["service"] == "defeat-worker"
    assert attempt["parent_span_id"] in {span["span_id"] for span in collector.spans if span["service"] == "defeat-api"}
    assert attempt["links"] == [sent["span_id"]]
    assert attempt["attributes"]["defeat.row"] == row_id
    assert attempt["attributes"]["defeat.outcome"] == "failed"
    assert {span["parent_span_id"] for span in collector.named("run")} == {attempt["span_id"]}

    lines = [line for line in log_lines(world) if line.get("request_id") == "my-request-1"]
    assert {"request", "claimed", "finished"} <= {line["event"] for line in lines}
    assert {line["trace_id"] for line in lines} == {CALLERS_TRACE}


def test_an_attempt_that_is_cut_short_is_exported_before_the_worker_ends(
    world: World, start: Start, collector: Collector
) -> None:
    job = world.job(["event", "progress", "teacher", {"fraction": 0.1}], ["until_told"], ["finish", "cancelled", {}])
    command = ("-m", "tests.support.scripted_worker", "--queues", "jobs")
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    worker = start(sys.executable, *command, **traced)
    until(lambda: world.now(job).status == "running")
    worker.terminate()
    worker.wait(20)
    (attempt,) = collector.named("job attempt")
    assert attempt["attributes"]["defeat.outcome"] == "handed_back"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
    ],
)
def test_unless_it_is_asked_for_no_exporter_is_loaded(environment: dict[str, str], tmp_path: Path) -> None:
    code = "import sys; from app.main import create_app; create_app(); print('opentelemetry.exporter' in sys.modules)"
    assert run(code, tmp_path, **environment).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"OTEL_TRACES_EXPORTER": "pigeon"}, "'pigeon'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'otlp_proto_grpc'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SPAN_EVENT_COUNT_LIMIT": "few"}, "few"),
    ],
)
def test_what_is_wrong_with_the_variables_is_said_and_the_service_starts(
    environment: dict[str, str], told: str, tmp_path: Path
) -> None:
    done = run("from app.main import create_app; create_app(); print('started')", tmp_path, **environment)
    assert done.stdout.strip() == "started"
    line = next(json.loads(line) for line in done.stderr.splitlines() if "traces_off" in line)
    assert told in line["error"]


def test_the_console_is_an_exporter_too(tmp_path: Path) -> None:
    code = "from app import traces; traces.configure('tests'); traces.span('here')(print)(); traces.flush()"
    shown = run(code, tmp_path, OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME="mine").stdout
    assert json.loads(shown)["name"] == "here"
    assert json.loads(shown)["resource"]["attributes"]["service.name"] == "mine"


def run(code: str, home: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | {"DEFEAT_HOME": str(home)} | environment,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
