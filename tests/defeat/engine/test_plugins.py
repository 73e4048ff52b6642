"""A detector family, a method and a dataset format from outside the source tree, one registration each, in one job."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.keys.service import create_key
from app.main import create_app
from app.settings import Settings, get_settings
from app.specs.catalog import load_catalog
from defeat.engine import plugins
from defeat.engine.data.importing import FORMATS, register
from defeat.engine.report import RunError
from tests.conftest import REPOSITORY
from tests.support import rows as seed
from tests.support.training import CLASSES, events, shapes, write_run
from worker.process import run_environment

FAMILY = """
from typing import Annotated, Literal

from pydantic import Field
from torchvision.models.detection.fcos import FCOSHead

from defeat.engine.detectors import Family, register
from defeat.engine.detectors.config import decides
from defeat.engine.detectors.fcos import ANCHORS, FCOSConfig, FCOSDetector


class ShallowConfig(FCOSConfig):
    architecture: Literal["shallow_fcos"] = "shallow_fcos"
    head_depth: Annotated[
        int, Field(description="Convolutions of the head.", ge=1, le=4, json_schema_extra=decides("tensors"))
    ] = 1


class ShallowDetector(FCOSDetector):
    def __init__(self, config, classes, *, pretrained_backbone=False):
        super().__init__(config, classes, pretrained_backbone=pretrained_backbone)
        self.head = FCOSHead(config.pyramid_channels, 1, len(classes) + 1, num_convs=config.head_depth)


register(
    Family(summary="FCOS with a head of any depth.", config=ShallowConfig, detector=ShallowDetector, anchors=ANCHORS)
)
"""
METHOD = """
from typing import Annotated, Literal

from pydantic import Field

from defeat.engine.config import Config
from defeat.engine.methods import Entry, register, weighs
from defeat.engine.methods.base import NeckMethod, pointwise


class GapConfig(Config):
    method: Literal["gap"] = "gap"
    push: Annotated[float, Field(description="Weight of the loss.", ge=0, json_schema_extra=weighs("neck"))] = 1.0


class Gap(NeckMethod):
    def __init__(self, config, student, teacher):
        super().__init__(student, teacher, pointwise)
        self.push = config.push

    def losses(self, student, teacher, step_info):
        pairs = zip(*self.maps(student, teacher), strict=True)
        return {"gap": self.push * sum((ours - theirs).abs().mean() for ours, theirs in pairs)}


register(Entry(summary="Absolute differences of the neck.", config=GapConfig, build=Gap, needs=("neck",)))
"""
FORMAT = """
from defeat.engine.data.importing import register
from defeat.engine.data.importing.base import Format, Parsed, RawBox, RawImage


def parse(source, directory, problems, tick):
    listed = source.read_json(directory / "boxes.json", limit=10**6)
    problems.listed(images=len(listed), boxes=sum(len(one["boxes"]) for one in listed))
    images = [
        RawImage(
            name=one["file"],
            path=source.locate((directory,), one["file"]),
            split=one["split"],
            stated_size=None,
            boxes=tuple(RawBox(class_name=name, x1=x1, y1=y1, x2=x2, y2=y2) for name, x1, y1, x2, y2 in one["boxes"]),
        )
        for one in listed
    ]
    return Parsed(tuple(sorted({box.class_name for image in images for box in image.boxes})), tuple(images))


def recognise(directory):
    return (directory / "boxes.json").is_file()


register(Format(name="one_json", title="One JSON", layout="boxes.json", recognise=recognise, parse=parse))
"""
MODULES = {"shallow_family": FAMILY, "gap_method": METHOD, "one_json_format": FORMAT}
IMPORT = {"max_dropped_fraction": 0.0, "max_unpacked_bytes": 10**9, "max_unpacked_files": 1000}
STUDENT = {
    "architecture": "shallow_fcos",
    "backbone": "timm/mobilenetv3_small_050",
    "strides": [8, 16],
    "extra_levels": "none",
    "pyramid_channels": 32,
    "min_size": 64,
    "max_size": 96,
    "score_threshold": 0.0,
}
SCHEDULE = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2}


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module as the worker runs it, with the environment that a run gets."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = run_environment() | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def result(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "result.json").read_text()))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside the source tree with the three modules, and the environment of workers that have them."""
    folder = tmp_path_factory.mktemp("outside")
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
        patch.setenv("DEFEAT_PLUGINS", ", ".join(MODULES))
        yield folder


@pytest.fixture(scope="module")
def dataset(outside: Path) -> Path:
    """A dataset that was imported by the format from outside."""
    made = shapes(outside / "made", train=8, val=2)
    files = outside / "files"
    shutil.copytree(outside / "made" / "source", files)
    listed = [
        {
            "file": image.name,
            "split": image.split,
            "boxes": [[CLASSES[box.class_index], box.x1, box.y1, box.x2, box.y2] for box in image.boxes],
        }
        for image in made.images
    ]
    (files / "boxes.json").write_text(json.dumps(listed))
    directory = outside / "import"
    directory.mkdir()
    request = {"kind": "import_dataset", "id": "ds_1", "attempt": 1, "spec": IMPORT}
    request["inputs"] = {"archive": None, "directory": str(files)}
    (directory / "run.json").write_text(json.dumps(request))
    done = python("defeat.engine.run", directory)
    assert result(directory)["status"] == "succeeded", done.stderr
    assert result(directory)["results"]["format"] == "one_json"
    assert result(directory)["results"]["classes"] == sorted(CLASSES)
    with tarfile.open(directory / "artifacts" / "dataset.tar") as tar:
        tar.extractall(outside / "canonical", filter="data")
    return outside / "canonical"


@pytest.fixture(scope="module")
def catalog(outside: Path) -> Path:
    """The catalog, written with the modules from outside."""
    done = python("defeat.engine.catalog", outside / "catalog.json")
    assert done.returncode == 0, done.stderr
    return outside / "catalog.json"


@pytest.fixture
def api(catalog: Path, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A service that reads that catalog."""
    monkeypatch.setenv("DATABASE_URL", sqlite_url)
    monkeypatch.setenv("DEFEAT_CATALOG", str(catalog))
    monkeypatch.setenv("DEFEAT_HOME", str(tmp_path / "home"))
    for cached in (get_settings, load_catalog):
        cached.cache_clear()
    with TestClient(create_app(Settings())) as client:
        yield client
    for cached in (get_settings, load_catalog):
        cached.cache_clear()


def test_a_job_with_a_family_and_a_method_from_outside(api: TestClient, dataset: Path, outside: Path, tmp_path: Path):
    database = api.app.state.database  # type: ignore[attr-defined]
    with database.write() as session:
        row, key = create_key(session, get_settings(), "lab", "laptop")
    api.headers["Authorization"] = f"Bearer {key}"
    assert "one_json" in api.get("/v1/catalog").json()["dataset_formats"]

    # The service checks the job by what the modules say of themselves.
    splits = {"train": {"images": 8, "boxes": 16}, "val": {"images": 2, "boxes": 4}}
    images = seed.dataset(database, row.tenant_id, classes=list(CLASSES), splits=splits)
    given = {"architecture": "shallow_fcos", "backbone": STUDENT["backbone"]}
    other = seed.checkpoint(database, row.tenant_id, detector={**given, "head_depth": 3}, classes=list(CLASSES))
    job = {
        "name": "outside",
        "dataset": images.id,
        "teacher": {"source": "train", "detector": {**STUDENT, "head_depth": 2}, "schedule": SCHEDULE},
        "student": {"detector": STUDENT},
        "distillation": {"method": "gap"},
        "schedule": SCHEDULE,
        "evaluation": {"gallery_images": 0},
    }
    start = {**job, "student": {"detector": given, "initial_weights": other.id}}
    refused = [
        (start, "tensors_do_not_fit", "another head_depth"),
        ({**job, "distillation": {"method": "gap", "push": 0}}, "weights_all_zero", "every weight is 0 (push)"),
        ({**job, "teacher": None}, "teacher_required", "method gap needs a teacher"),
        ({**job, "student": {"detector": {**STUDENT, "head_depth": 9}}}, "validation_failed", "at most 4"),
    ]
    for body, code, says in refused:
        answer = api.post("/v1/jobs/validate", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
        assert says in answer.json()["detail"]
    answer = api.post("/v1/jobs/validate", json=job)
    assert answer.status_code == 200, answer.text
    spec = answer.json()["spec"]
    assert (spec["student"]["detector"]["head_depth"], spec["distillation"]) == (1, {"method": "gap", "push": 1.0})

    # What it resolved runs.
    directory = write_run(tmp_path / "run", dataset, spec)
    done = python("defeat.engine.run", directory)
    assert result(directory)["status"] == "succeeded", (result(directory), done.stderr)
    last = [one["values"] for one in events(directory, "metrics") if one["subject"] == "student"][-1]
    assert last["loss/gap"] > 0
    student = directory / "artifacts" / "student-best.safetensors"
    done = python("defeat.engine.detect", student, outside / "files" / "0.png", "--score", "0")
    assert json.loads(done.stdout)["detections"], done.stderr
    unknown = python("defeat.engine.detect", student, outside / "files" / "0.png", DEFEAT_PLUGINS="")
    assert "detector.architecture is 'shallow_fcos'; known: faster_rcnn" in unknown.stderr


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps({"kind": "import_dataset", "id": "ds_1", "spec": {}, "inputs": {}}))
    done = python("defeat.engine.run", tmp_path, DEFEAT_PLUGINS="no_such_module")
    assert done.returncode == 1
    failure = result(tmp_path)["failure"]
    assert (failure["class"], failure["code"]) == ("infra", "plugin_unavailable")
    assert "DEFEAT_PLUGINS names the module 'no_such_module', which cannot be imported" in failure["detail"]


def test_two_of_one_name_are_rejected():
    voc = FORMATS["voc"]
    register(voc)  # the same one again, as when a module is imported twice
    with pytest.raises(ValueError, match="there is a dataset format named 'voc' already"):
        plugins.add(FORMATS, "dataset format", "voc", FORMATS["coco"])


def test_a_run_gets_the_modules_and_none_of_the_services_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEFEAT_PLUGINS", "mine")
    monkeypatch.setenv("DEFEAT_SECRET", "secret")
    environment = run_environment()
    assert environment["DEFEAT_PLUGINS"] == "mine"
    assert "DEFEAT_SECRET" not in environment


def test_names_may_be_spaced_and_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEFEAT_PLUGINS", " json, ,os ")
    plugins.load()
    monkeypatch.setenv("DEFEAT_PLUGINS", "json,no_such_module")
    with pytest.raises(RunError, match="no_such_module"):
        plugins.load()
