"""The request for a checkpoint's check, and what it stores and deletes."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.models import Checkpoint
from tests.support.worker_world import World
from tests.worker.tasks.conftest import prepare


def unchecked(world: World) -> Checkpoint:
    stored = world.put("checkpoints/ckpt_1/upload-abc", b"upload")
    return world.checkpoint(id="ckpt_1", upload_key=stored.key, classes=["RBC"])


def test_a_checked_checkpoint(world: World, scripted: Any, tmp_path: Path) -> None:
    row = unchecked(world)
    request = prepare(world, row, tmp_path / "run")
    assert (request.kind, request.spec) == ("check_checkpoint", {"detector": None, "classes": ["RBC"]})
    assert Path(request.inputs["weights"]).read_bytes() == b"upload"

    results = {"detector": {"architecture": "faster_rcnn"}, "classes": ["RBC"], "coverage": {"loaded": 1, "total": 1}}
    steps = (["artifact", "checkpoint.safetensors", "checkpoint", "weights", {}], ["finish", "succeeded", results])
    row = scripted(row, *steps)

    assert row.status == "ready"
    assert {name: getattr(row, name) for name in results} == results
    assert (row.size_bytes, len(row.sha256), row.upload_key) == (7, 64, None)
    assert world.content(row.storage_key) == b"weights"


@pytest.mark.parametrize(("failure_class", "status"), [("data", "invalid"), ("user", "invalid"), ("infra", "failed")])
def test_a_checkpoint_that_is_refused(world: World, scripted: Any, failure_class: str, status: str) -> None:
    coverage = {"loaded": 0, "total": 9}
    failure = {"class": failure_class, "code": "does_not_fit", "detail": "nothing fits"}
    result = {"status": "failed", "results": {"coverage": coverage}, "failure": failure, "artifacts": []}
    row = scripted(unchecked(world), ["write", "result.json", json.dumps(result)])
    assert (row.status, row.failure["code"], row.coverage) == (status, "does_not_fit", coverage)


def test_a_success_without_its_file_or_results_is_a_failure(world: World, scripted: Any) -> None:
    row = scripted(unchecked(world), ["finish", "succeeded", {"detector": {}, "classes": []}])
    assert (row.status, row.failure["code"]) == ("failed", "bad_result")
    assert row.failure["detail"].endswith("without coverage, checkpoint.safetensors")
