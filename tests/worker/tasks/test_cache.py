"""The unpacked datasets on a worker's machine."""

import io
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from app.models import Job
from defeat.engine.report import RunError
from tests.support.worker_world import World
from tests.worker.tasks.conftest import prepare
from worker.tasks import HANDLERS
from worker.tasks.cache import KEPT


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
