"""The import run through its front door, `python -m defeat.engine.run`, and what it promises about its results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from defeat.engine.data import canonical
from defeat.engine.report import Cancelled, Reporter
from tests.conftest import REPOSITORY
from tests.defeat.engine.data.conftest import Import
from tests.support.datasets import coco, image_bytes, put, tar_of, voc, zip_of

SPEC = {"max_dropped_fraction": 0.05, "max_unpacked_bytes": 10**9, "max_unpacked_files": 10_000}


def prepare(directory: Path, *, archive: Path | None = None, source: Path | None = None) -> Path:
    inputs = {"archive": archive and str(archive), "directory": source and str(source)}
    document = {"kind": "import_dataset", "id": "ds_1", "attempt": 1, "spec": SPEC, "inputs": inputs}
    put(directory / "run.json", json.dumps(document))
    return directory


def start(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "defeat.engine.run", str(directory)], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )


def result(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def test_a_run_from_archive_to_dataset(tmp_path: Path) -> None:
    archive = tar_of(voc(tmp_path / "tree"), tmp_path / "upload", "w:gz", prefix="VOC")
    directory = prepare(tmp_path / "run", archive=archive)
    assert start(directory).wait(60) == 0
    found = result(directory)
    assert found["status"] == "succeeded"
    assert found["artifacts"] == [
        {"name": "dataset.tar", "kind": "dataset", "content_type": "application/x-tar", "details": {}},
        {"name": "report.json", "kind": "report", "content_type": "application/json", "details": {}},
    ]
    results = found["results"]
    tar = directory / "artifacts/dataset.tar"
    dataset = canonical.unpack(tar, tmp_path / "read")
    assert results["format"] == "voc"
    assert results["classes"] == list(dataset.classes) == ["blob", "cell"]
    assert results["splits"] == dataset.counts()
    assert results["content_hash"] == canonical.content_hash(dataset)
    assert results["size_bytes"] == tar.stat().st_size
    assert results["report"] == json.loads((directory / "artifacts/report.json").read_text())
    assert results["report"] == {
        "format": "voc",
        "images": 3,
        "boxes": 4,
        "masks": 0,
        "classes": [
            {"name": "blob", "splits": {"train": {"images": 1, "boxes": 1}, "val": {"images": 0, "boxes": 0}}},
            {"name": "cell", "splits": {"train": {"images": 2, "boxes": 2}, "val": {"images": 1, "boxes": 1}}},
        ],
        "splits": {"train": {"images": 2, "boxes": 3}, "val": {"images": 1, "boxes": 1}},
        "problems": [],
        "dropped_fraction": 0.0,
        "max_dropped_fraction": 0.05,
    }
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    progress = [(event["phase"], event["fraction"]) for event in events if event["type"] == "progress"]
    assert [fraction for _, fraction in progress] == sorted(fraction for _, fraction in progress)
    assert list(dict.fromkeys(phase for phase, _ in progress)) == ["importing", "checking"]
    assert progress[-1] == ("checking", 1.0)


def test_a_run_of_an_invalid_dataset_reports(tmp_path: Path) -> None:
    directory = prepare(tmp_path / "run", archive=put(tmp_path / "upload", b"no archive"))
    assert start(directory).wait(60) == 1
    found = result(directory)
    assert (found["status"], found["failure"]["class"], found["failure"]["code"]) == (
        "failed",
        "data",
        "not_an_archive",
    )
    assert [artifact["name"] for artifact in found["artifacts"]] == ["report.json"]
    report = json.loads((directory / "artifacts/report.json").read_text())
    assert [(problem["code"], problem["severity"]) for problem in report["problems"]] == [("not_an_archive", "fatal")]
    assert (report["format"], report["images"], report["classes"], report["splits"]) == (None, 0, [], {})


def test_sigterm_cancels_and_leaves_no_half_dataset(tmp_path: Path) -> None:
    # Decoding takes seconds, by far longer than the signal.
    stems = [f"{number:04}" for number in range(500)]
    root = voc(tmp_path / "tree", {"train": {stem: [("cell", 1, 1, 9, 9)] for stem in stems}})
    large = image_bytes(1, (2500, 2500))
    for stem in stems:
        put(root / f"JPEGImages/{stem}.png", large)
    directory = prepare(tmp_path / "run", source=root)
    process = start(directory)
    deadline = time.monotonic() + 60
    events = directory / "events.jsonl"
    while not (events.exists() and '"progress"' in events.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    found = result(directory)
    assert (found["status"], found["failure"], found["artifacts"]) == ("cancelled", None, [])


def test_equal_data_makes_equal_bytes_however_it_was_packed(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    outcomes = [
        run_import(root),
        run_import(zip_of(root, tmp_path / "forwards.zip")),
        run_import(zip_of(root, tmp_path / "backwards.zip", prefix="some/folder/", backwards=True)),
        run_import(tar_of(root, tmp_path / "x.tar.xz", "w:xz", prefix="other")),
    ]
    assert len({outcome.results["content_hash"] for outcome in outcomes}) == 1
    assert len({outcome.tar.read_bytes() for outcome in outcomes}) == 1
    put(root / "ImageSets/Main/train.txt", "two\none\n")
    assert run_import(root).tar.read_bytes() == outcomes[0].tar.read_bytes()
    put(root / "JPEGImages/one.png", image_bytes(50))
    assert run_import(root).results["content_hash"] != outcomes[0].results["content_hash"]


def test_the_source_directory_is_left_alone(tmp_path: Path, run_import: Import) -> None:
    root = coco(tmp_path / "tree")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    run_import(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_import_starts_without_torch_and_the_format_without_images() -> None:
    script = (
        "import sys, defeat.engine.data.canonical; assert not {'PIL', 'numpy', 'torch'} & set(sys.modules); "
        "import defeat.engine.data.importing.importer; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, env={**os.environ, "PYTHONPATH": "."})


def test_real_data_is_clean_but_for_its_two_empty_boxes(bccd: Path, tmp_path: Path, run_import: Import) -> None:
    outcome = run_import(bccd, max_dropped_fraction=0.05)
    assert outcome.failure is None
    assert outcome.results["classes"] == ["Platelets", "RBC", "WBC"]
    assert outcome.results["splits"] == {
        "train": {"images": 205, "boxes": 2804},
        "val": {"images": 87, "boxes": 1137},
        "test": {"images": 72, "boxes": 945},
    }
    assert outcome.problems() == {"empty_box": ("dropped", 2)}
    assert {example["file"] for example in outcome.examples("empty_box")} == {
        "BloodImage_00338.jpg",
        "BloodImage_00343.jpg",
    }
    again = run_import(zip_of(bccd, tmp_path / "x", prefix="BCCD/"))
    assert again.results["content_hash"] == outcome.results["content_hash"]


@pytest.mark.parametrize("phase", ["importing", "checking"])
def test_cancelling_in_either_phase(
    tmp_path: Path, run_import: Import, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    progress = Reporter.progress

    def cancel(self: Reporter, name: str, **members: Any) -> None:
        progress(self, name, **members)
        self.cancelled |= name == phase

    monkeypatch.setattr(Reporter, "progress", cancel)
    monkeypatch.setattr("defeat.engine.data.importing.importer._PROGRESS_EVERY_S", 0)
    with pytest.raises(Cancelled):
        run_import(zip_of(voc(tmp_path / "tree"), tmp_path / "x"))
    assert not list((tmp_path / "run0/artifacts").iterdir())
