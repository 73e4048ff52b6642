"""The request for a dataset's check, and what it stores and deletes."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.models import Dataset
from defeat.engine.report import RunError
from tests.support.worker_world import World
from tests.worker.tasks.conftest import prepare

RESULTS = {
    "format": "voc",
    "classes": ["RBC"],
    "splits": {"train": {"images": 1, "boxes": 2}},
    "content_hash": "sha256:" + "0" * 64,
    "size_bytes": 3,
    "report": {"format": "voc", "problems": []},
}


def uploaded(world: World, **values: Any) -> Dataset:
    stored = world.put("datasets/ds_1/upload-abc", b"archive")
    return world.dataset(id="ds_1", upload_key=stored.key, **values)


def test_an_imported_dataset(world: World, scripted: Any) -> None:
    row = scripted(uploaded(world), ["artifact", "dataset.tar", "dataset", "tar", {}], ["finish", "succeeded", RESULTS])
    assert (row.status, row.failure, row.upload_key) == ("ready", None, None)
    assert {name: getattr(row, name) for name in RESULTS} == RESULTS
    assert world.content(row.storage_key) == b"tar"
    assert world.storage.list("datasets/ds_1") == [row.storage_key]


def test_an_invalid_dataset_keeps_its_report(world: World, scripted: Any) -> None:
    report = {"problems": [{"code": "no_classes"}]}
    steps = (["artifact", "report.json", "report", json.dumps(report), {}], ["fail", "data", "no_classes", "none"])
    row = scripted(uploaded(world), *steps)
    assert (row.status, row.failure["code"], row.report) == ("invalid", "no_classes", report)
    assert (row.upload_key, row.storage_key) == (None, None)
    assert world.storage.list("datasets/ds_1") == []


def test_a_dataset_that_could_not_be_checked(world: World, scripted: Any) -> None:
    row = scripted(uploaded(world), ["fail", "infra", "disk_full", "no room"])
    assert (row.status, row.failure["class"]) == ("failed", "infra")
    assert world.storage.list("datasets/ds_1") == [row.upload_key]


def test_an_uploads_request(world: World, tmp_path: Path) -> None:
    request = prepare(world, uploaded(world, max_dropped_fraction=0.1), tmp_path / "run")
    assert request.kind == "import_dataset"
    limits = {"max_unpacked_bytes": 100 * 1024**3, "max_unpacked_files": 2_000_000}
    assert request.spec == {"max_dropped_fraction": 0.1, **limits}
    assert Path(request.inputs["archive"]).read_bytes() == b"archive"
    assert request.inputs["directory"] is None


def reference(world: World, path: Path) -> Dataset:
    return world.dataset(source={"kind": "reference", "uri": path.as_uri()})


def test_a_reference_is_checked_again(world: World, tmp_path: Path) -> None:
    root, outside = tmp_path / "my data", tmp_path / "outside"
    for directory in (root / "cells", outside):
        directory.mkdir(parents=True)
    (root / "cells.zip").touch()
    (root / "link").symlink_to(outside)

    refused = [(root / "cells", "none are configured"), (root / "link", "is outside"), (root / "gone", "neither")]
    with pytest.raises(RunError, match=refused[0][1]):
        prepare(world, reference(world, refused[0][0]), tmp_path / "run")
    world.settings.dataset_roots = [root]
    for path, reason in refused[1:]:
        with pytest.raises(RunError, match=reason):
            prepare(world, reference(world, path), tmp_path / "run")
    with pytest.raises(RunError, match="is outside"):
        prepare(world, reference(world, root / ".." / "outside"), tmp_path / "run")

    inputs = prepare(world, reference(world, root / "cells"), tmp_path / "run").inputs
    assert inputs == {"archive": None, "directory": str(root / "cells")}
    inputs = prepare(world, reference(world, root / "cells.zip"), tmp_path / "run").inputs
    assert inputs == {"archive": str(root / "cells.zip"), "directory": None}
