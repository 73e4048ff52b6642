"""Bad input through the front door: what people and hostile tenants send, and the clear answer that they get.

The application is the real one; archives and weights are judged by the real supervisor and real runs.
"""

import base64
import json
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr, ValidationError
from starlette.testclient import TestClient

from app import logs
from app.db import Database
from app.http.auth import SESSION_COOKIE, make_session
from app.keys.service import create_key
from app.main import create_app
from app.models import ApiKey
from app.request_models import MAX_ERRORS
from app.settings import MIB, Settings
from defeat.engine import detectors
from defeat.engine.detectors.faster_rcnn import FasterRCNNConfig
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig
from tests.app.conftest import ONE_DATABASE, RecordingQueue
from tests.support import rows as seed
from tests.support.datasets import put, tar_with, voc, zip_of
from tests.support.training import CLASSES, TINY
from tests.support.waiting import until
from worker.supervisor import Supervisor
from worker.tasks import HANDLERS
from worker.tasks.base import Context

PROBLEM = "application/problem+json"
DEADLINE_S = 20.0


@dataclass
class Front:
    """The service as a tenant sees it, with a worker that works when it is told to."""

    app: FastAPI
    client: TestClient
    settings: Settings
    database: Database
    key: ApiKey
    plaintext: str

    @property
    def queue(self) -> RecordingQueue:
        return self.app.state.queue

    def upload(self, collection: str, body: dict[str, Any], content: bytes) -> dict[str, Any]:
        """Create a resource, send its content, let the worker check it, and return it."""
        created = self.client.post(f"/v1/{collection}", json=body)
        assert created.status_code == 201, created.text
        links = created.json()["links"]
        assert self.client.put(links["content"], content=content).status_code == 202
        self.work()
        return self.client.get(links["self"]).json()

    def work(self) -> None:
        """Let a worker carry out what the queue holds."""
        context = Context(self.app.state.database, self.app.state.storage, self.settings)
        supervisor = Supervisor(context, owner="test", stop=threading.Event(), tick_s=0.02, backoff_s=0.01)
        while self.queue.sent:
            task, _row_id = self.queue.sent.pop()
            supervisor.work(HANDLERS[task](context))

    def page(self, path: str) -> Any:
        """Get a page of the dashboard."""
        cookie = f"{SESSION_COOKIE}={make_session(self.settings, self.key.id)}"
        return self.client.get(path, headers={"Cookie": cookie})


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    # FastAPI builds each route at its first request, which costs more than most tests do.
    yield create_app(Settings(home=tmp_path_factory.mktemp("unused"), log_level="CRITICAL"))
    logs.configure("INFO")  # the level is the process's


@pytest.fixture
def front(shared_app: FastAPI, database: Database, database_url: str, tmp_path: Path) -> Iterator[Front]:
    settings = Settings(
        home=tmp_path / "home",
        database_url=database_url,
        secret=SecretStr("a secret for tests only"),
        max_unpacked_bytes=4 * MIB,
        sweep_s=3600,
    )
    shared_app.state.settings = settings
    with database.write() as session:
        key, plaintext = create_key(session, settings, "lab", "laptop")
    with TestClient(shared_app, headers={"Authorization": f"Bearer {plaintext}"}) as client:
        shared_app.state.queue = RecordingQueue()
        yield Front(shared_app, client, settings, database, key, plaintext)


@pytest.fixture
def spec(front: Front) -> dict[str, Any]:
    """A spec that is taken, in terms of the packaged catalog."""
    dataset = seed.dataset(front.database, front.key.tenant_id)
    return {
        "name": "cells",
        "dataset": dataset.id,
        "teacher": {"source": "pretrained", "detector": "fasterrcnn_resnet50_fpn", "weights": "COCO_V1"},
        "student": {"detector": {"architecture": "faster_rcnn", "backbone": "timm/mobilenetv3_small_050"}},
        "distillation": {"method": "defeat"},
    }


def _changed(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of the spec with one value replaced."""
    copy = json.loads(json.dumps(spec))
    *parents, last = path.split(".")
    place = copy
    for key in parents:
        place = place[key]
    place[last] = value
    return copy


# ---- what a spec names ----


def test_the_spec_itself_is_good(front: Front, spec: dict[str, Any]) -> None:
    assert front.client.post("/v1/jobs/validate", json=spec).status_code == 200


@ONE_DATABASE
@pytest.mark.parametrize(
    ("path", "value", "code", "choices"),
    [
        ("colour", 1, "unknown_key", ["dataset", "distillation", "student", "teacher"]),
        ("student.colour", 1, "unknown_key", ["detector", "initial_weights"]),
        ("student.detector.colour", 1, "unknown_key", ["backbone", "strides"]),
        ("distillation.colour", 1, "unknown_key", ["method"]),
        ("student.detector.architecture", "yolo", "unknown_architecture", ["faster_rcnn"]),
        ("student.detector.backbone", "timm/mobilenet_v3", "unknown_backbone", ["timm/mobilenetv3_small_050"]),
        ("teacher.detector", "yolov8", "unknown_detector", ["fasterrcnn_resnet50_fpn"]),
        ("teacher.weights", "COCO_V9", "unknown_weights", ["COCO_V1"]),
        ("student.initial_weights", "coco", "unknown_weights", ["random", "imagenet", "ckpt_"]),
        ("distillation.method", "magic", "unknown_method", ["defeat", "baseline"]),
    ],
)
def test_an_unknown_name_lists_the_choices(
    front: Front, spec: dict[str, Any], path: str, value: Any, code: str, choices: list[str]
) -> None:
    answer = front.client.post("/v1/jobs", json=_changed(spec, path, value))
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    (mistake,) = answer.json()["errors"]
    assert (mistake["pointer"], mistake["code"]) == ("/" + path.replace(".", "/"), code)
    assert [choice for choice in choices if choice not in mistake["detail"]] == []
    assert front.client.get("/v1/jobs").json()["data"] == []
    assert front.queue.sent == []


@ONE_DATABASE
def test_a_one_stage_student_has_no_proposals_to_compare(front: Front, spec: dict[str, Any]) -> None:
    student = {"architecture": "retinanet", "backbone": "timm/mobilenetv3_small_050"}
    spec = _changed(spec, "student.detector", student)
    answer = front.client.post("/v1/jobs", json=spec)
    assert (answer.status_code, answer.json()["code"]) == (422, "head_does_not_pair")
    pointers = [mistake["pointer"] for mistake in answer.json()["errors"]]
    assert pointers == ["/distillation/head_object_weight", "/distillation/head_background_weight"]
    for key in ("head_object_weight", "head_background_weight"):
        spec = _changed(spec, f"distillation.{key}", 0)
    assert front.client.post("/v1/jobs/validate", json=spec).status_code == 200
    neck_only = _changed(spec, "distillation", {"method": "pkd"})
    assert front.client.post("/v1/jobs/validate", json=neck_only).status_code == 200


@ONE_DATABASE
@pytest.mark.parametrize(
    ("path", "value", "pointer", "says"),
    [
        ("schedule", {"epochs": 8, "decay_epochs": [6, 8]}, "/schedule/decay_epochs", "below epochs, which is 8"),
        ("schedule", {"decay_epochs": [2], "decay": "cosine"}, "/schedule/decay_epochs", "belongs to decay: step"),
        ("student.detector.min_size", 1500, "/student/detector/min_size", "at most max_size, which is 1333"),
        ("student.detector.strides", [8, 4], "/student/detector/strides", "known: [4], [4, 8], "),
        ("student.detector.strides", [4, 16], "/student/detector/strides", "[8, 16, 32]"),
    ],
)
def test_what_the_engine_would_refuse_starts_no_job(
    front: Front, spec: dict[str, Any], path: str, value: Any, pointer: str, says: str
) -> None:
    body = _changed(spec, path, value)
    answer = front.client.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    (mistake,) = answer.json()["errors"]
    assert mistake["pointer"] == pointer
    assert says in mistake["detail"]
    config, part = (
        (ScheduleConfig, body["schedule"]) if path == "schedule" else (FasterRCNNConfig, body["student"]["detector"])
    )
    with pytest.raises(RunError):
        config.parse(part, where=path)


@ONE_DATABASE
def test_what_the_engine_takes_is_taken(front: Front, spec: dict[str, Any]) -> None:
    good = [
        ("schedule", {"epochs": 9, "decay_epochs": [6, 8]}),
        ("schedule", {"decay": "cosine"}),
        ("student.detector.strides", [8, 16]),
    ]
    for path, value in good:
        answer = front.client.post("/v1/jobs/validate", json=_changed(spec, path, value))
        assert answer.status_code == 200, answer.text


# ---- archives ----


def _link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("cells.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def _with_member(name: str) -> Callable[[Path], Path]:
    def _make(folder: Path) -> Path:
        path = zip_of(voc(folder / "voc"), folder / "x.zip")
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(8 * MIB) if name == "zeros.bin" else b"x")
        return path

    return _make


def _cut_off(folder: Path) -> Path:
    path = zip_of(voc(folder / "voc"), folder / "x.zip")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@ONE_DATABASE
@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (_with_member("../escaped.txt"), "unsafe_path", "'../escaped.txt'"),
        (_with_member("/etc/cron.d/escaped"), "unsafe_path", "'/etc/cron.d/escaped'"),
        (lambda folder: tar_with(folder / "x", [(_link(tarfile.SYMTYPE), b"")]), "link_in_archive", "'cells.png'"),
        (lambda folder: tar_with(folder / "x", [(_link(tarfile.LNKTYPE), b"")]), "link_in_archive", "'cells.png'"),
        (_with_member("zeros.bin"), "archive_too_large", str(4 * MIB)),
        (_cut_off, "broken_archive", ""),
        (lambda folder: put(folder / "x", b"GIF89a"), "not_an_archive", "zip"),
    ],
    ids=["parent", "absolute", "symlink", "hardlink", "expansion", "cut", "other"],
)
def test_a_hostile_archive_is_an_invalid_dataset(
    front: Front, tmp_path: Path, make: Callable[[Path], Path], code: str, says: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    body = {"name": "cells", "source": {"kind": "upload"}}
    dataset = front.upload("datasets", body, make(folder).read_bytes())
    assert (dataset["status"], dataset["failure"]["class"], dataset["failure"]["code"]) == ("invalid", "data", code)
    assert says in dataset["failure"]["detail"]
    assert not list(tmp_path.rglob("*escaped*"))
    problems = front.client.get(dataset["links"]["report"]).json()["problems"]
    assert [(problem["code"], problem["severity"]) for problem in problems] == [(code, "fatal")]
    assert front.app.state.storage.list(f"datasets/{dataset['id']}") == []


@ONE_DATABASE
@pytest.mark.parametrize(("fraction", "status"), [(0.0, "invalid"), (0.9, "ready")])
def test_a_image_that_does_not_decode_is_named(front: Front, tmp_path: Path, fraction: float, status: str) -> None:
    root = voc(tmp_path / "voc")
    put(root / "JPEGImages/two.png", b"no image at all")
    body = {"name": "cells", "source": {"kind": "upload"}, "max_dropped_fraction": fraction}
    dataset = front.upload("datasets", body, zip_of(root, tmp_path / "x.zip").read_bytes())
    assert dataset["status"] == status
    report = front.client.get(dataset["links"]["report"]).json()
    (problem,) = [problem for problem in report["problems"] if problem["code"] == "broken_image"]
    assert (problem["severity"], problem["count"]) == ("dropped", 1)
    assert "two" in problem["examples"][0]["file"]
    if status == "invalid":
        assert dataset["failure"]["code"] == "too_many_bad_annotations"


def test_names_that_no_database_takes_are_shown_escaped(front: Front, tmp_path: Path) -> None:
    name = "caf\udce9"
    path = tar_with(tmp_path / "x", [(tarfile.TarInfo(name), b"x")])
    dataset = front.upload("datasets", {"name": "cells", "source": {"kind": "upload"}}, path.read_bytes())
    assert (dataset["status"], dataset["failure"]["code"]) == ("invalid", "unsafe_path")
    assert "caf" in dataset["failure"]["detail"]


@ONE_DATABASE
def test_a_dataset_that_is_not_ready_starts_no_job(front: Front, spec: dict[str, Any], tmp_path: Path) -> None:
    dataset = front.client.post("/v1/datasets", json={"name": "cells", "source": {"kind": "upload"}}).json()
    body = spec | {"dataset": dataset["id"]}

    def _refused() -> str:
        answer = front.client.post("/v1/jobs", json=body)
        assert (answer.status_code, answer.headers["content-type"]) == (409, PROBLEM)
        assert answer.json()["code"] == "dataset_not_ready"
        return str(answer.json()["detail"])

    assert "is awaiting_upload; send its archive first" in _refused()
    front.client.put(dataset["links"]["content"], content=b"GIF89a")
    assert "is queued" in _refused()
    front.work()
    assert "is invalid: " in _refused()


# ---- weights ----


def _weights(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> tuple[bytes, int]:
    """Return a torch file of a changed detector, and how many tensors the whole one has."""
    state = dict(detectors.build(TINY, CLASSES).state_dict())
    total = len(state)
    change(state)
    torch.save(state, tmp_path / "x.pt")
    return (tmp_path / "x.pt").read_bytes(), total


def test_missing_and_foreign_tensors_are_counted(front: Front, spec: dict[str, Any], tmp_path: Path) -> None:
    """A foreign name holds what PostgreSQL takes in no text, and is longer than any reason may be."""

    def _change(state: dict[str, torch.Tensor]) -> None:
        for name in ("rpn.head.cls_logits.bias", "rpn.head.cls_logits.weight"):
            del state[name]
        state["evil\0name" + "x" * 30_000] = torch.zeros(1)

    content, total = _weights(tmp_path, _change)
    body = {"name": "teacher", "detector": TINY, "classes": list(CLASSES)}
    checkpoint = front.upload("checkpoints", body, content)
    failure = checkpoint["failure"]
    assert (checkpoint["status"], failure["class"], failure["code"]) == ("invalid", "data", "tensors_do_not_fit")
    assert f"{total - 2} of the detector's {total} tensors fit" in failure["detail"]
    assert "2 missing: rpn.head.cls_logits" in failure["detail"]
    assert "1 unexpected: evil" in failure["detail"]
    assert len(failure["detail"]) <= 20_000
    answer = front.client.post("/v1/jobs", json=spec | {"teacher": {"source": "checkpoint", "id": checkpoint["id"]}})
    assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_not_ready")


@ONE_DATABASE
def test_classes_are_named_once(front: Front) -> None:
    answer = front.client.post("/v1/checkpoints", json={"name": "a", "classes": ["cell", "disc", "cell"]})
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    (mistake,) = answer.json()["errors"]
    assert (mistake["pointer"], mistake["code"]) == ("/classes", "duplicate_class")
    assert "'cell'" in mistake["detail"]


# ---- an upload that is cut off ----


@pytest.fixture
def port(front: Front) -> Iterator[int]:
    """Port of the application behind a real server: a test client cannot break a connection."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(front.app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield int(listening.getsockname()[1])
    server.should_exit = True
    thread.join(DEADLINE_S)
    listening.close()


@ONE_DATABASE
@pytest.mark.parametrize("framing", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
def test_a_cut_upload_leaves_the_dataset_waiting(front: Front, port: int, framing: str) -> None:
    dataset = front.client.post("/v1/datasets", json={"name": "cells", "source": {"kind": "upload"}}).json()
    path = dataset["links"]["content"]
    parts = front.settings.scratch / "uploads"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {front.plaintext}\r\n{framing}\r\n\r\n"
        connection.sendall(head.encode() + b"400\r\n" + b"x" * 0x400 + b"\r\n")
        until(lambda: list(parts.glob("*.part")))
    until(lambda: not list(parts.glob("*.part")))
    assert front.client.get(dataset["links"]["self"]).json()["status"] == "awaiting_upload"
    assert front.queue.sent == []
    assert front.client.put(path, content=b"whole").status_code == 202
    assert front.client.get(dataset["links"]["self"]).json()["status"] == "queued"


# ---- text, numbers and sizes that break parsers and databases ----


TEXTS = ["\0", "a\0b", "\ud800", "\udfff\ud800"]


@pytest.mark.parametrize("text", TEXTS, ids=["nul", "nul_inside", "surrogate", "surrogates"])
def test_text_that_no_database_takes_is_refused_everywhere(front: Front, spec: dict[str, Any], text: str) -> None:
    bodies: list[tuple[str, Any]] = [
        ("/v1/datasets", {"name": text, "source": {"kind": "upload"}}),
        ("/v1/datasets", {"name": "a", "source": {"kind": text}}),
        ("/v1/datasets", {"name": "a", "source": {"kind": "reference", "uri": f"file:///{text}"}}),
        ("/v1/checkpoints", {"name": text}),
        ("/v1/checkpoints", {"name": "a", "classes": ["b", text]}),
        ("/v1/checkpoints", {"name": "a", "detector": {text: text}}),
        ("/v1/checkpoints", text),
        ("/v1/checkpoints", [text]),
    ]
    changes = [
        ("name", text),
        ("dataset", text),
        ("labels", {text: "a"}),
        ("labels", {"a": text}),
        ("teacher", {"source": text}),
        ("teacher", {"source": "checkpoint", "id": text}),
        ("teacher.weights", text),
        ("student.initial_weights", text),
        ("student.detector.backbone", text),
        ("distillation.method", text),
        (f"distillation.{text}", 1),
        ("schedule", {text: text}),
        (text, 1),
    ]
    bodies += [("/v1/jobs", _changed(spec, path, value)) for path, value in changes]
    for path, body in bodies:
        for headers in ({}, {"Idempotency-Key": "once"}):
            content = json.dumps(body).encode()
            answer = front.client.post(path, content=content, headers={"Content-Type": "application/json", **headers})
            assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM), (path, body, answer.text)
            assert answer.json()["errors"]


def _cursor(*members: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(members).encode()).decode().rstrip("=")


def test_queries_that_no_database_takes_are_refused(front: Front) -> None:
    cursors = [
        "%00",
        _cursor("2026-01-01T00:00:00+00:00", "a\0"),
        _cursor("2026-01-01T00:00:00+00:00", "\ud800"),
        _cursor("0001-01-01T00:00:00+14:00", "job_1"),
        _cursor("9999-12-31T23:59:59-14:00", "job_1"),
    ]
    queries = [f"after={cursor}" for cursor in cursors] + ["name=%00", "name=a%00b", "status=%00", "dataset=ds_%00"]
    for query in queries:
        for path in ("datasets", "checkpoints", "jobs") if query.startswith("after") else ("jobs",):
            answer = front.client.get(f"/v1/{path}?{query}")
            assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM), (path, query)
            if path != "checkpoints" and not query.startswith("dataset="):
                page = front.page(f"/{path}?{query}")
                assert (page.status_code, page.headers["content-type"]) == (422, "text/html; charset=utf-8"), query
    assert front.client.get("/v1/jobs?name=%ED%A0%80").status_code == 200  # not UTF-8: read as replacement characters


@ONE_DATABASE
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("labels", {str(number): 1 for number in range(50_000)}),
        ("student.detector.strides", [1] * 300_000),
        ("student.detector", {"architecture": "faster_rcnn"} | {str(number): 1 for number in range(50_000)}),
        ("schedule", {"a": [float("nan")] * 180_000}),
        ("teacher", {"source": "m" * 900_000}),
        ("student.detector.backbone", "timm/" * 180_000),
        ("", {str(number): 1 for number in range(50_000)}),
    ],
    ids=["labels", "items", "keys", "nan", "tag", "long", "outer"],
)
def test_a_flood_of_mistakes_gets_a_short_answer(front: Front, spec: dict[str, Any], path: str, value: Any) -> None:
    """A megabyte of mistakes once took 20 s and was answered with 35 MB."""
    body = _changed(spec, path, value) if path else spec | value
    answer = front.client.post(
        "/v1/jobs", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    assert len(answer.json()["errors"]) <= MAX_ERRORS
    assert len(answer.content) < 100_000
    if path not in ("teacher", "student.detector.backbone"):
        assert f"more than {MAX_ERRORS} errors" in answer.json()["detail"]


@ONE_DATABASE
@pytest.mark.parametrize("depth", [40, 300, 900, 960, 990, 100_000])
def test_nesting_never_reaches_a_recursion_limit(front: Front, depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        content = ('{"name": ' + opening * depth + "1" + closing * depth + "}").encode()
        for path in ("/v1/datasets", "/v1/checkpoints", "/v1/jobs", "/v1/jobs/validate"):
            headers = {"Content-Type": "application/json", "Idempotency-Key": f"deep-{depth}"}
            answer = front.client.post(path, content=content, headers=headers)
            assert answer.status_code in (400, 422), (path, answer.text[:200])
            assert answer.headers["content-type"] == PROBLEM


@ONE_DATABASE
def test_an_announced_length_of_any_number_of_digits_is_too_large(front: Front) -> None:
    dataset = front.client.post("/v1/datasets", json={"name": "a", "source": {"kind": "upload"}}).json()
    for digits in ("9" * 20, "9" * 5000):
        answer = front.client.put(dataset["links"]["content"], content=b"x", headers={"Content-Length": digits})
        assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")


# ---- what the service itself offers ----


@ONE_DATABASE
@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_no_page_of_ours_runs_other_peoples_scripts(front: Front, path: str) -> None:
    answer = front.client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert "/openapi.json" in answer.json()["detail"]
    assert front.client.get("/openapi.json").status_code == 200
    assert 'href="/openapi.json"' in front.page("/jobs").text


@pytest.mark.parametrize("secret", ["x", "fifteen letters"])
def test_a_short_secret_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secret: str) -> None:
    monkeypatch.setenv("DEFEAT_SECRET", secret)
    with pytest.raises(ValidationError, match=f"has {len(secret)} characters.* at least 16") as refused:
        Settings(home=tmp_path)
    if len(secret) > 1:
        assert secret not in str(refused.value)
    monkeypatch.setenv("DEFEAT_SECRET", secret.ljust(16, "!"))
    assert Settings(home=tmp_path).secret_bytes() == secret.ljust(16, "!").encode()
