"""What each kind of row asks its run for, and what it keeps of what the run leaves."""

import io
import json
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from app.models import Checkpoint, Dataset, Job, Tenant
from defeat.engine.report import RunError
from tests.support.worker_world import World
from worker.tasks import HANDLERS
from worker.tasks.base import Request
from worker.tasks.cache import KEPT


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "home")


def prepare(world: World, row: Any, directory: Path) -> Request:
    directory.mkdir(exist_ok=True)
    with ExitStack() as resources:
        return HANDLERS[type(row).TASK](world.context).prepare(row, directory, resources)


@pytest.fixture
def scripted(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a dataset's or checkpoint's run follow a script."""

    def _scripted(row: Any, *script: Any) -> Any:
        handler = HANDLERS[type(row).TASK]
        prepare = handler.prepare

        def _prepare(self: Any, *args: Any) -> Request:
            request = prepare(self, *args)
            return Request(request.kind, {**request.spec, "script": script}, request.inputs)

        monkeypatch.setattr(handler, "prepare", _prepare)
        world.work(row)
        return world.now(row)

    return _scripted


# ---- jobs ----


def ready_checkpoint(world: World, data: bytes, **values: Any) -> Checkpoint:
    stored = world.put(f"checkpoints/ckpt_{data.decode()}/weights-1.safetensors", data)
    return world.checkpoint(id=f"ckpt_{data.decode()}", status="ready", storage_key=stored.key, **values)


def test_a_jobs_inputs(world: World, tmp_path: Path) -> None:
    teacher, student = ready_checkpoint(world, b"teacher"), ready_checkpoint(world, b"student")
    resume = world.put("jobs/x/resume/1-1.pt", b"resume")
    spec = {"teacher": {"source": "checkpoint", "id": teacher.id}, "student": {"initial_weights": student.id}}
    job = world.job(spec=spec, resume_key=resume.key, dataset_id=world.ready_dataset(b'{"a": 1}').id)

    request = prepare(world, job, tmp_path / "run")

    assert request.kind == "distill"
    assert request.spec == spec
    inputs = request.inputs
    assert (Path(inputs["dataset"]) / "dataset.json").read_text() == '{"a": 1}'
    contents = {name: Path(inputs[name]).read_bytes() for name in ("teacher", "student", "resume")}
    assert contents == {"teacher": b"teacher", "student": b"student", "resume": b"resume"}
    assert (inputs["teacher_initial"], inputs["device"], inputs["image_memory_bytes"]) == (None, "auto", None)


@pytest.mark.parametrize(
    "teacher", [None, {"source": "pretrained"}, {"source": "train", "initial_weights": "imagenet"}]
)
def test_a_job_without_checkpoints(world: World, tmp_path: Path, teacher: Any) -> None:
    inputs = prepare(world, world.job(teacher=teacher), tmp_path / "run").inputs
    assert [inputs[name] for name in ("teacher", "student", "teacher_initial", "resume")] == [None] * 4


def test_a_trained_teacher_may_begin_with_a_checkpoint(world: World, tmp_path: Path) -> None:
    initial = ready_checkpoint(world, b"initial")
    job = world.job(teacher={"source": "train", "initial_weights": initial.id})
    inputs = prepare(world, job, tmp_path / "run").inputs
    assert Path(inputs["teacher_initial"]).read_bytes() == b"initial"
    assert inputs["teacher"] is None


def test_another_tenants_checkpoint_is_not_there(world: World, tmp_path: Path) -> None:
    world.add(Tenant(id="other", name="other"))
    theirs = ready_checkpoint(world, b"theirs", tenant_id="other")
    job = world.job(teacher={"source": "checkpoint", "id": theirs.id})
    with pytest.raises(RunError, match="ckpt_theirs was deleted"):
        prepare(world, job, tmp_path / "run")


def test_a_dataset_that_is_gone(world: World) -> None:
    dataset = world.ready_dataset()
    job = world.job(["finish", "succeeded", {}], dataset_id=dataset.id)
    world.storage.delete(dataset.storage_key)
    world.work(job)
    failure = world.now(job).failure
    assert (failure["class"], failure["code"]) == ("infra", "object_missing")


def test_a_trained_teacher_becomes_a_checkpoint(world: World) -> None:
    details = {"detector": {"architecture": "faster_rcnn"}, "classes": ["RBC"], "coverage": {"loaded": 3, "total": 3}}
    job = world.job(
        ["artifact", "teacher.safetensors", "teacher", "weights", details],
        ["finish", "succeeded", {"teacher": {"ap": 0.5}}],
        teacher={"source": "train"},
    )

    world.work(job)

    [checkpoint] = world.all(Checkpoint)
    assert world.now(job).results == {"teacher": {"ap": 0.5}, "teacher_checkpoint_id": checkpoint.id}
    assert (checkpoint.status, checkpoint.name, checkpoint.source_job_id) == ("ready", "small teacher", job.id)
    assert (checkpoint.detector, checkpoint.classes) == (details["detector"], ["RBC"])
    assert checkpoint.coverage == details["coverage"]
    assert checkpoint.tenant_id == job.tenant_id
    assert world.content(checkpoint.storage_key) == b"weights"
    assert checkpoint.sha256 == world.artifacts(job)["teacher.safetensors"].sha256


def test_a_teacher_of_a_job_that_failed_is_no_checkpoint(world: World) -> None:
    steps = [["artifact", "teacher.safetensors", "teacher", "weights", {}], ["fail", "oom", "out_of_memory", "too big"]]
    job = world.job(*steps, teacher={"source": "train"})
    world.work(job)
    assert world.all(Checkpoint) == []
    assert "teacher.safetensors" in world.artifacts(job)


def test_the_end_of_one_attempt_leaves_the_next_ones_files_alone(world: World) -> None:
    """The owner of a job that failed may have it tried again before its old worker has tidied up."""
    job = world.job(["fail", "user", "wrong", "wrong"], attempt=1)
    keys = [f"jobs/{job.id}/{name}" for name in ("artifacts/1/a", "artifacts/3/a", "resume/1-1.pt", "resume/3-1.pt")]
    for key in keys:
        world.put(key, b"x")
    world.work(job)
    assert world.now(job).attempt == 2
    assert world.storage.list(f"jobs/{job.id}") == sorted([f"jobs/{job.id}/artifacts/2/log.txt", *keys[1:]])


def test_the_cache_keeps_the_last_used_and_what_is_in_use(world: World, tmp_path: Path) -> None:
    jobs = [world.job(dataset_id=world.ready_dataset(b"%d" % number).id) for number in range(KEPT + 2)]
    cache = world.settings.scratch / "datasets"
    handler = HANDLERS[Job.TASK](world.context)
    with ExitStack() as in_use:
        (tmp_path / "first").mkdir()
        held = Path(handler.prepare(jobs[0], tmp_path / "first", in_use).inputs["dataset"])
        for job in jobs[1:]:
            newest = Path(prepare(world, job, tmp_path / "run").inputs["dataset"])
        assert (held / "dataset.json").read_text() == "0"
        assert newest.is_dir()
    prepare(world, jobs[-1], tmp_path / "run")
    left = [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert len(left) == KEPT
    assert held not in left


def test_the_cache_removes_what_a_dead_worker_left(world: World, tmp_path: Path) -> None:
    cache = world.settings.scratch / "datasets"
    (cache / f"{'0' * 64}.abc.part" / "images").mkdir(parents=True)
    (cache / f"{'0' * 64}.abc.tar").touch()
    prepare(world, world.job(), tmp_path / "run")
    assert [path.suffix for path in cache.iterdir() if path.name.startswith("0" * 64)] == [".lock"]


def _member(name: str, **values: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("../dataset.json"),
        _member("/dataset.json"),
        _member("images/x.jpg"),
        _member(f"images/{'0' * 64}.jpg/x"),
        _member("dataset.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        _member(f"images/{'0' * 64}.jpg", type=tarfile.LNKTYPE, linkname="dataset.json"),
        _member("images", type=tarfile.DIRTYPE),
        _member("dataset.json", type=tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name} {member.type!r}",
)
def test_a_stored_dataset_holds_nothing_else(world: World, tmp_path: Path, member: tarfile.TarInfo) -> None:
    tar = tmp_path / "d.tar"
    with tarfile.open(tar, "w") as archive:
        archive.addfile(member)
    dataset = world.ready_dataset()
    world.put(str(dataset.storage_key), tar.read_bytes())
    with pytest.raises(RunError, match="does not belong in a dataset") as caught:
        prepare(world, world.job(dataset_id=dataset.id), tmp_path / "run")
    assert caught.value.code == "object_broken"
    left = [path for path in tmp_path.rglob("*") if path.is_symlink() or ".part" in path.name]
    assert not left


def test_a_stored_dataset_is_unpacked_as_it_is(world: World, tmp_path: Path) -> None:
    content = {
        "dataset.json": b"{}",
        f"images/{'0a' * 32}.jpg": bytes(range(256)) * 9000,
        f"images/{'1' * 64}.webp": b"",
    }
    tar = tmp_path / "d.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in content.items():
            archive.addfile(_member(name, size=len(data)), io.BytesIO(data))
    dataset = world.ready_dataset()
    world.put(str(dataset.storage_key), tar.read_bytes())
    path = Path(prepare(world, world.job(dataset_id=dataset.id), tmp_path / "run").inputs["dataset"])
    assert {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()} == content


@pytest.mark.parametrize("content_hash", ["sha256:../../x", "", "x" * 64])
def test_a_content_hash_is_not_a_path(world: World, tmp_path: Path, content_hash: str) -> None:
    dataset = world.ready_dataset()
    world.set(dataset, content_hash=content_hash)
    with pytest.raises(RunError, match="64 hexadecimal digits"):
        prepare(world, world.job(dataset_id=dataset.id), tmp_path / "run")


# ---- datasets ----

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


# ---- checkpoints ----


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


def test_every_task_has_its_handler() -> None:
    assert set(HANDLERS) == {Job.TASK, Dataset.TASK, Checkpoint.TASK}
