"""The canonical form: written the same way always, read back exactly, refused when damaged."""

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defeat.engine.data import canonical
from defeat.engine.data.canonical import AnnotatedImage, Box, CanonicalDataset
from defeat.engine.data.masks import to_text
from defeat.engine.report import RunError
from tests.support.datasets import image_bytes, put
from tests.support.reference import to_coco


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put(tmp_path / "source.png", image_bytes(1))


@pytest.fixture
def file(source: Path) -> str:
    return f"images/{hashlib.sha256(source.read_bytes()).hexdigest()}.png"


@pytest.fixture
def dataset(file: str) -> CanonicalDataset:
    boxes = (Box(0, 0, 0, 64, 48), Box(1, 1, 2, 3, 5, crowd=True), Box(1, 1, 2, 3.5, 5, difficult=True))
    images = (
        AnnotatedImage(1, file, "b.png", 64, 48, "test", ()),
        AnnotatedImage(2, file, "ä.png", 64, 48, "train", boxes),
    )
    return CanonicalDataset(("cell", "blob"), images)


def pack(tmp_path: Path, dataset: CanonicalDataset, sources: dict[str, Path]) -> Path:
    canonical.pack(tmp_path / "dataset.tar", dataset, sources, tick=lambda _: None)
    return tmp_path / "dataset.tar"


def test_write_then_read(tmp_path: Path, dataset: CanonicalDataset, file: str, source: Path) -> None:
    canonical.write(tmp_path / "d", dataset, {file: source})
    assert canonical.read(tmp_path / "d") == dataset
    assert (tmp_path / "d" / file).read_bytes() == source.read_bytes()


def test_pack_then_unpack(tmp_path: Path, dataset: CanonicalDataset, file: str, source: Path) -> None:
    tar = pack(tmp_path, dataset, {file: source})
    assert canonical.unpack(tar, tmp_path / "d") == dataset
    assert (tmp_path / "d" / file).read_bytes() == source.read_bytes()
    with tarfile.open(tar, "r:") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == ["dataset.json", file]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_a_image_that_changed_meanwhile(tmp_path: Path, dataset: CanonicalDataset, file: str, source: Path) -> None:
    source.write_bytes(image_bytes(2))
    with pytest.raises(RunError, match="changed while") as caught:
        pack(tmp_path, dataset, {file: source})
    assert (caught.value.failure_class, caught.value.code) == ("data", "source_changed")


def test_the_content_hash_is_a_promise(dataset: CanonicalDataset) -> None:
    """Datasets are known by it: this value must not change between releases."""
    assert (
        canonical.content_hash(CanonicalDataset(("cell",), ()))
        == "sha256:" + hashlib.sha256(b'{"classes":["cell"],"images":[]}').hexdigest()
    )
    other = CanonicalDataset(dataset.classes[::-1], dataset.images)
    assert canonical.content_hash(dataset) != canonical.content_hash(other)


def test_without_masks_the_form_is_what_it_was(tmp_path: Path, dataset: CanonicalDataset, file: str) -> None:
    """Byte by byte: datasets that are kept must stay readable, and known by their hash."""
    (tmp_path / "source.png").write_bytes(image_bytes(1))
    one = CanonicalDataset(("cell",), (AnnotatedImage(1, file, "b.png", 64, 48, "test", (Box(0, 0, 0.5, 64, 48),)),))
    canonical.write(tmp_path / "d", one, {file: tmp_path / "source.png"})
    assert (tmp_path / "d/dataset.json").read_text() == (
        f'{{"format_version": 1, "content_hash": "{canonical.content_hash(one)}", "classes": ["cell"], '
        f'"images": [{{"id": 1, "file": "{file}", "name": "b.png", "width": 64, "height": 48, "split": "test", '
        '"boxes": [{"class": 0, "box": [0, 0.5, 64, 48], "crowd": false, "difficult": false}]}]}'
    )


def with_masks(dataset: CanonicalDataset) -> CanonicalDataset:
    """The second image's first box has the left half of the image for a mask."""
    empty, full = dataset.images
    first, *rest = full.boxes
    boxes = (replace(first, mask=to_text(np.array([0, 32 * 48, 32 * 48]))), *rest)
    return replace(dataset, images=(empty, replace(full, boxes=boxes)))


def test_masks_make_the_second_version(tmp_path: Path, dataset: CanonicalDataset, file: str, source: Path) -> None:
    masked = with_masks(dataset)
    assert (dataset.masks, masked.masks) == (0, 1)
    assert canonical.content_hash(masked) != canonical.content_hash(dataset)
    canonical.write(tmp_path / "d", masked, {file: source})
    document = json.loads((tmp_path / "d/dataset.json").read_text())
    assert document["format_version"] == 2
    assert [box.get("mask") for box in document["images"][1]["boxes"]] == [masked.images[1].boxes[0].mask, None, None]
    assert canonical.read(tmp_path / "d") == masked


@pytest.mark.parametrize("change", [{"format_version": 1}, {"mask": 5}, {"mask": [1, 2]}, {"mask": None}])
def test_damaged_masks_are_refused(
    tmp_path: Path, dataset: CanonicalDataset, file: str, source: Path, change: dict[str, Any]
) -> None:
    canonical.write(tmp_path / "d", with_masks(dataset), {file: source})
    document = json.loads((tmp_path / "d/dataset.json").read_text())
    place = document if "format_version" in change else document["images"][1]["boxes"][0]
    place.update(change)
    (tmp_path / "d/dataset.json").write_text(json.dumps(document))
    with pytest.raises(RunError) as caught:
        canonical.read(tmp_path / "d")
    assert (caught.value.failure_class, caught.value.code) == ("infra", "broken_dataset")


CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("format_version",), 2),
    (("format_version",), None),
    (("content_hash",), "sha256:0"),
    (("classes", 0), "other"),
    (("classes", 0), 5),
    (("images", 0, "file"), "../../etc/passwd"),
    (("images", 0, "split"), "all"),
    (("images", 0, "width"), "wide"),
    (("images", 1, "boxes", 0, "box"), [0, 0, 65, 48]),
    (("images", 1, "boxes", 0, "box"), [0, 0, 48]),
    (("images", 1, "boxes", 0, "box"), [float("nan"), 0, 5, 5]),
    (("images", 1, "boxes", 0, "class"), 2),
    (("images", 1, "boxes", 0, "class"), -1),
    (("images",), None),
]


@pytest.mark.parametrize(("where", "value"), CHANGES)
def test_a_damaged_document_is_refused(
    tmp_path: Path, dataset: CanonicalDataset, file: str, source: Path, where: tuple[Any, ...], value: object
) -> None:
    canonical.write(tmp_path / "d", dataset, {file: source})
    document = json.loads((tmp_path / "d/dataset.json").read_text())
    target = document
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    (tmp_path / "d/dataset.json").write_text(json.dumps(document))
    with pytest.raises(RunError) as caught:
        canonical.read(tmp_path / "d")
    assert (caught.value.failure_class, caught.value.code) == ("infra", "broken_dataset")


@pytest.mark.parametrize("content", [None, b"", b"[]", b"[" * 200_000])
def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        put(tmp_path / "dataset.json", content)
    with pytest.raises(RunError, match="import the dataset again"):
        canonical.read(tmp_path)


def test_a_hostile_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped"))
    with pytest.raises(RunError, match="escaped") as caught:
        canonical.unpack(tmp_path / "x.tar", tmp_path / "d")
    assert caught.value.code == "broken_dataset"


def test_coco_ground_truth(dataset: CanonicalDataset, file: str) -> None:
    assert to_coco(dataset, "train") == {
        "info": {"description": "train split"},
        "images": [{"id": 2, "file_name": file, "width": 64, "height": 48}],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 1, "bbox": [0, 0, 64, 48], "area": 3072, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": [1, 2, 2, 3], "area": 6, "iscrowd": 1},
            {"id": 3, "image_id": 2, "category_id": 2, "bbox": [1, 2, 2.5, 3], "area": 7.5, "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "blob"}],
    }  # fmt: skip
    assert to_coco(dataset, "val")["images"] == []
