"""The main job as its users do it: `defeat up`, the command, HTTP, and the downloaded student on its own."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
import yaml

from app.stack.embedded import broker_binary
from defeat.engine.data.loading.batch import to_float
from defeat.engine.data.loading.loader import read_image
from defeat.engine.detectors import load
from examples import digits
from tests.support.postgres import driver_url
from tests.support.reference import coco_evaluation

DEFEAT = str(Path(sys.executable).with_name("defeat"))
EXAMPLES = Path(__file__).parent.parent / "examples"


@dataclass
class Service:
    """A running `defeat up`."""

    url: str
    key: str
    home: Path

    def run(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """Run a `defeat` command with `--json` and return the lines it printed."""
        environment = {"DEFEAT_URL": self.url, "DEFEAT_API_KEY": self.key, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [DEFEAT, *arguments, "--json"], env=environment, capture_output=True, text=True, timeout=3000, check=False
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]


@contextlib.contextmanager
def up(home: Path, **environment: str) -> Iterator[Service]:
    """Run `defeat up` with its data under `home`, and end it."""
    command = [DEFEAT, "up", "--home", str(home), "--port", "0", "--json"]
    with (home / "stack.log").open("w") as log:
        stack = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environment}
        )
    assert stack.stdout is not None
    try:
        line = stack.stdout.readline()
        assert line, (home / "stack.log").read_text()
        address = json.loads(line)
        yield Service(address["url"], address["api_key"], home)
    finally:
        stack.terminate()
        assert stack.wait(60) == 0
        stack.stdout.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with up(tmp_path_factory.mktemp("home")) as running:
        yield running


def average_precision(truth: dict[str, Any], student: Path, paths: dict[int, Path]) -> float:
    """Return pycocotools' AP of the student file's own detections; nothing of the service's evaluation is used."""
    detector = load(student)
    results, ids = [], sorted(paths, key=lambda image_id: paths[image_id].name)
    for start in range(0, len(ids), 8):
        batch = ids[start : start + 8]
        images = [to_float(read_image(paths[image_id]), torch.device("cpu")) for image_id in batch]
        for image_id, found in zip(batch, detector.detect(images), strict=True):
            for (x1, y1, x2, y2), label, score in zip(
                found["boxes"].double().tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
            ):
                box = [x1, y1, x2 - x1, y2 - y1]
                results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return float(coco_evaluation(truth, results).stats[0])


def small(spec: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Return the spec with so many epochs for teacher and student."""
    spec["teacher"]["schedule"]["epochs"] = spec["schedule"]["epochs"] = epochs
    return spec


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return digits.build(tmp_path_factory.mktemp("digits") / "scenes", train_scenes=48, val_scenes=16)


@pytest.fixture(scope="module")
def finished(service, scenes, tmp_path_factory):
    """A dataset from a zip, and a finished job on it."""
    directory = tmp_path_factory.mktemp("client")
    archive = shutil.make_archive(str(directory / "scenes"), "zip", scenes)
    dataset = service.run("datasets", "add", archive, "--name", "digits", "--wait")[-1]
    spec = small(yaml.safe_load((EXAMPLES / "digits.yaml").read_text()), 2)
    (directory / "spec.yaml").write_text(yaml.safe_dump(spec))
    updates = service.run("jobs", "submit", str(directory / "spec.yaml"), "--set", f"dataset={dataset['id']}", "--wait")
    return directory, updates


def test_a_job_from_a_zip_to_a_student_whose_map_pycocotools_confirms(service, scenes, finished):
    directory, updates = finished
    job = updates[-1]
    assert job["status"] == "succeeded"
    # A phase that is short may pass between two looks. What each training left is kept.
    phases = {one["job"]["progress"]["phase"] for one in updates[:-1] if one["job"]["progress"]}
    assert phases
    assert phases <= {"preparing", "teacher", "evaluation", "distillation", "finishing"}
    assert {row["subject"] for one in updates[:-1] for row in one["metrics"]} == {"teacher", "student"}
    (line,) = service.run("jobs", "download", job["id"], "--output", str(directory))
    student = Path(line["files"][0]["path"])
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    paths = {image["id"]: scenes / "images" / "val" / image["file_name"] for image in truth["images"]}
    assert job["results"]["student"]["ap"] == pytest.approx(average_precision(truth, student, paths), abs=1e-6)


def test_metrics_and_evaluations_are_whole(service, finished):
    _, updates = finished
    steps = [(row["subject"], row["step"]) for one in updates[:-1] for row in one["metrics"]]
    assert len(steps) == len(set(steps))
    assert {step for subject, step in steps if subject == "student"} == {10, 12, 20, 24}
    measured = [(row["subject"], row["epoch"]) for one in updates[:-1] for row in one["evaluations"]]
    assert sorted(measured) == [("student", 1), ("student", 2), ("teacher", 1), ("teacher", 2)]


def test_the_log_and_the_gallery_are_there(service, finished):
    directory, updates = finished
    service.run(
        "jobs", "download", updates[-1]["id"], "log.txt", "gallery.json", "metrics.json", "--output", str(directory)
    )
    assert "student evaluated after epoch 2" in (directory / "log.txt").read_text()
    assert len(json.loads((directory / "gallery.json").read_text())["images"]) == 12


def test_the_trained_teacher_serves_another_job_and_the_baseline_none(service, finished):
    directory, updates = finished
    job = updates[-1]
    spec = {key: value for key, value in job["spec"].items() if key != "labels"}
    spec["teacher"] = {"source": "checkpoint", "id": job["results"]["teacher_checkpoint_id"]}
    spec["schedule"]["epochs"] = 1
    (directory / "again.yaml").write_text(yaml.safe_dump(spec))
    again = service.run("jobs", "submit", str(directory / "again.yaml"), "--wait")[-1]
    assert again["results"]["teacher"]["ap"] == job["results"]["teacher"]["ap"]
    spec["teacher"], spec["distillation"] = None, {"method": "baseline"}
    (directory / "baseline.yaml").write_text(yaml.safe_dump(spec))
    baseline = service.run("jobs", "submit", str(directory / "baseline.yaml"), "--wait")[-1]
    assert baseline["results"]["teacher"] is None


def test_a_running_job_is_cancelled_and_the_exit_code_says_so(service, finished):
    directory, updates = finished
    changes = ["--set", f"dataset={updates[-1]['dataset_id']}", "--set", "schedule.epochs=500"]
    (job,) = service.run("jobs", "submit", str(directory / "spec.yaml"), *changes)
    watching = subprocess.Popen(
        [DEFEAT, "jobs", "watch", job["id"], "--json"],
        env={"DEFEAT_URL": service.url, "DEFEAT_API_KEY": service.key},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    for line in watching.stdout:
        if json.loads(line)["job"]["status"] == "running":
            break
    service.run("jobs", "cancel", job["id"])
    rest = watching.stdout.read()
    watching.stdout.close()
    assert watching.wait(60) == 1
    assert json.loads(rest.splitlines()[-1])["status"] == "cancelled"


@contextlib.contextmanager
def broker(directory: Path) -> Iterator[str]:
    """Run a broker of our own on a loopback port and give its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [broker_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(30)


def test_services_of_ones_own_are_used_instead_of_embedded_ones(empty_postgres_url, scenes, tmp_path):
    home, objects = tmp_path / "home", tmp_path / "objects"
    home.mkdir()
    with broker(tmp_path) as redis_url:
        urls = {"DATABASE_URL": empty_postgres_url, "REDIS_URL": redis_url, "STORAGE_URL": objects.as_uri()}
        with up(home, **urls) as running:
            dataset = running.run("datasets", "add", str(scenes), "--name", "digits", "--wait")[-1]
    assert dataset["status"] == "ready"
    with psycopg.connect(driver_url(empty_postgres_url)) as connection:
        assert connection.execute("SELECT id, status FROM datasets").fetchall() == [(dataset["id"], "ready")]
    assert list((objects / "datasets" / dataset["id"]).iterdir())
    assert {path.name for path in home.iterdir()}.isdisjoint({"defeat.sqlite3", "objects", "broker", "broker.sock"})


@pytest.mark.slow
def test_blood_cells(service, tmp_path, bccd):
    """Real images with real blemishes: the report names them, and the mAP in the database is pycocotools'."""
    archive = shutil.make_archive(str(tmp_path / "bccd"), "zip", bccd)
    dataset = service.run("datasets", "add", archive, "--name", "bccd", "--wait")[-1]
    (report,) = service.run("datasets", "report", dataset["id"])
    problems = {problem["code"]: problem for problem in report["problems"]}
    assert problems["empty_box"]["count"] == 2
    named = " ".join(example["file"] for example in problems["empty_box"]["examples"])
    assert "BloodImage_00338" in named
    assert "BloodImage_00343" in named

    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(small(yaml.safe_load((EXAMPLES / "bccd.yaml").read_text()), 3)))
    changes = ["--set", f"dataset={dataset['id']}"]
    job = service.run("jobs", "submit", str(tmp_path / "spec.yaml"), *changes, "--wait")[-1]
    (line,) = service.run("jobs", "download", job["id"], "--output", str(tmp_path))
    paths, truth = voc_truth(bccd, "test", ["Platelets", "RBC", "WBC"])
    found = average_precision(truth, Path(line["files"][0]["path"]), paths)
    assert found > 0.2  # it has learnt something
    assert job["results"]["student"]["ap"] == pytest.approx(found, abs=1e-6)


def voc_truth(root: Path, split: str, classes: list[str]) -> tuple[dict[int, Path], dict[str, Any]]:
    """Read a VOC split into COCO's ground truth, by hand: boxes as they stand, those without area left out."""
    names = (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    paths = {number: root / "JPEGImages" / f"{name}.jpg" for number, name in enumerate(names, start=1)}
    annotations = []
    for number, path in paths.items():
        tree = ElementTree.parse(root / "Annotations" / f"{path.stem}.xml")
        width, height = (float(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        for thing in tree.findall("object"):
            x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
            if x2 > x1 and y2 > y1:
                box = [x1, y1, x2 - x1, y2 - y1]
                category = classes.index(thing.findtext("name")) + 1
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box,
                     "area": box[2] * box[3], "iscrowd": 0}
                )  # fmt: skip
    categories = [{"id": index, "name": name} for index, name in enumerate(classes, start=1)]
    return paths, {
        "images": [{"id": number} for number in paths],
        "annotations": annotations,
        "categories": categories,
    }


@pytest.mark.slow
def test_the_demo():
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["demo"] == "ok"
    assert summary["teacher_ap50"] >= 0.80
    assert summary["student_ap50"] >= 0.60
