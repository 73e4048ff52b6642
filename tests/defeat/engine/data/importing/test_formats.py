"""Finding the layout, and reading each format."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from defeat.engine.data import canonical
from defeat.engine.data.canonical import CanonicalDataset
from defeat.engine.data.importing import FORMATS
from defeat.engine.data.importing.base import split_of
from tests.defeat.engine.data.conftest import Import
from tests.support.datasets import (
    GOOD_BOX,
    HEIGHT,
    WIDTH,
    coco,
    coco_document,
    image_bytes,
    put,
    voc,
    voc_xml,
    zip_of,
)


def read(tar: Path) -> CanonicalDataset:
    return canonical.unpack(tar, tar.parent / "read")


def by_name(dataset: CanonicalDataset) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    return {
        (image.split, image.name): [
            (dataset.classes[box.class_index], box.x1, box.y1, box.x2, box.y2) for box in image.boxes
        ]
        for image in dataset.images
    }


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("train2017", "train"), ("Training", "train"), ("train_2014", "train"), ("val", "val"),
        ("valid", "val"), ("validation", "val"), ("val2017", "val"), ("test", "test"), ("test-dev2017", "test"),
        ("trainval", None), ("minival2014", None), ("2017", None), ("", None), ("tests", None),
    ],
)  # fmt: skip
def test_split_names(name: str, split: str | None) -> None:
    assert split_of(name) == split


# --- finding it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "VOC/", "a/b/c/"])
def test_a_voc_archive_is_found_in_its_wrapping(tmp_path: Path, run_import: Import, prefix: str) -> None:
    root = voc(tmp_path / "tree")
    for litter in (
        "__MACOSX/x/Annotations/._one.xml",
        "__MACOSX/x/JPEGImages/._one",
        "__MACOSX/x/ImageSets/Main/train.txt",
    ):
        put(root / litter, "litter")
    put(root / ".DS_Store", "litter")
    outcome = run_import(zip_of(root, tmp_path / "x", prefix=prefix))
    assert outcome.failure is None
    assert outcome.results["format"] == "voc"
    assert outcome.results["classes"] == ["blob", "cell"]
    assert outcome.results["splits"] == {"train": {"images": 2, "boxes": 3}, "val": {"images": 1, "boxes": 1}}
    assert outcome.report["problems"] == []
    assert by_name(read(outcome.tar)) == {
        ("train", "one.png"): [("cell", 4, 5, 20, 30), ("blob", 1, 1, 9, 9)],
        ("train", "two.png"): [("cell", 10, 10, 40, 40)],
        ("val", "three.png"): [("cell", 0, 0, WIDTH, HEIGHT)],
    }


@pytest.mark.parametrize("arrangement", ["beside", "images/tag", "images/alike", "images", "in the names"])
def test_coco_images_are_found_where_people_put_them(tmp_path: Path, run_import: Import, arrangement: str) -> None:
    root = coco(tmp_path / "tree")
    images = root / "images"
    if arrangement == "images/tag":
        images.mkdir()
        for tag in ("train2017", "val2017"):
            (root / tag).rename(images / tag)
    elif arrangement == "images/alike":
        images.mkdir()
        (root / "train2017").rename(images / "train")
        (root / "val2017").rename(images / "valid")
    elif arrangement == "images":
        (root / "train2017").rename(images)
        (root / "val2017/c.png").rename(images / "c.png")
    elif arrangement == "in the names":
        document = coco_document(["train2017/a.png", "train2017/b.png"])
        put(root / "annotations/instances_train2017.json", json.dumps(document))
    outcome = run_import(root)
    assert outcome.failure is None
    assert outcome.results["format"] == "coco"
    assert outcome.results["classes"] == ["cell", "blob"]  # by category id
    assert outcome.results["splits"] == {"train": {"images": 2, "boxes": 2}, "val": {"images": 1, "boxes": 1}}
    assert outcome.report["problems"] == []
    boxes = by_name(read(outcome.tar))
    assert list(boxes.values()) == [[("cell", 4, 5, 20, 30)]] * 3


def test_a_roboflow_export(tmp_path: Path, run_import: Import) -> None:
    categories = [
        {"id": 0, "name": "hand", "supercategory": "none"},
        {"id": 1, "name": "hand", "supercategory": "hand"},
    ]
    for number, split in enumerate(("train", "valid", "test")):
        document = coco_document(["x.png"], categories=categories)
        document["annotations"][0]["category_id"] = 1
        put(tmp_path / "tree/export" / split / "_annotations.coco.json", json.dumps(document))
        put(tmp_path / "tree/export" / split / "x.png", image_bytes(number))
    outcome = run_import(zip_of(tmp_path / "tree", tmp_path / "x"))
    assert outcome.failure is None
    assert outcome.results["classes"] == ["hand"]
    assert list(outcome.results["splits"]) == ["train", "val", "test"]


def test_a_root_category_that_is_used_is_a_class(tmp_path: Path, run_import: Import) -> None:
    categories = [{"id": 0, "name": "thing"}, {"id": 3, "name": "cell", "supercategory": "thing"}]
    annotations = [{"image_id": 1, "category_id": 0, "bbox": [1, 1, 5, 5]}]
    outcome = run_import(coco(tmp_path / "tree", categories=categories, annotations=annotations))
    assert outcome.results["classes"] == ["thing", "cell", "blob"]


def test_no_layout_names_what_was_looked_for_and_what_is_there(tmp_path: Path, run_import: Import) -> None:
    put(tmp_path / "tree/labels/x.txt", "")
    put(tmp_path / "tree/data.yaml", "")
    outcome = run_import(zip_of(tmp_path / "tree", tmp_path / "x"))
    assert outcome.failure is not None
    assert outcome.failure.code == "unknown_layout"
    for format_ in FORMATS.values():
        assert format_.layout in outcome.failure.detail
    assert "data.yaml, labels" in outcome.failure.detail
    assert outcome.problems() == {"unknown_layout": ("fatal", 1)}
    assert outcome.report["format"] is None


def test_two_datasets_are_ambiguous(tmp_path: Path, run_import: Import) -> None:
    voc(tmp_path / "tree/VOC2007")
    coco(tmp_path / "tree/other")
    outcome = run_import(tmp_path / "tree")
    assert outcome.failure is not None
    assert outcome.failure.code == "unknown_layout"
    assert "VOC2007 (Pascal VOC), other (COCO)" in outcome.failure.detail


def test_two_files_for_one_split_are_ambiguous(tmp_path: Path, run_import: Import) -> None:
    root = coco(tmp_path / "tree")
    shutil.copy(root / "annotations/instances_train2017.json", root / "annotations/instances_train2014.json")
    outcome = run_import(root)
    assert outcome.failure is not None
    assert outcome.failure.code == "unknown_layout"
    assert "annotations/instances_train2014.json and annotations/instances_train2017.json" in outcome.failure.detail


def test_a_directory_that_is_not_there(tmp_path: Path, run_import: Import) -> None:
    outcome = run_import(tmp_path / "gone")
    assert outcome.failure is not None
    assert outcome.failure.code == "missing_directory"


# --- VOC -------------------------------------------------------------------------------------------------------------


def test_trainval_alone_is_train_and_else_ignored(tmp_path: Path, run_import: Import) -> None:
    splits = {"trainval": {"one": [GOOD_BOX], "two": [GOOD_BOX]}, "test": {"three": [GOOD_BOX]}}
    outcome = run_import(voc(tmp_path / "alone", splits))
    assert outcome.results["splits"] == {"train": {"images": 2, "boxes": 2}, "test": {"images": 1, "boxes": 1}}
    root = voc(tmp_path / "both")
    put(root / "ImageSets/Main/trainval.txt", "one\ntwo\nthree\n")
    outcome = run_import(root)
    assert outcome.results["splits"] == {"train": {"images": 2, "boxes": 3}, "val": {"images": 1, "boxes": 1}}
    assert outcome.report["problems"] == []


@pytest.mark.parametrize("name", ["one.PNG", "one.JpEg", "one.jpg"])
def test_image_extensions_in_any_case(tmp_path: Path, run_import: Import, name: str) -> None:
    root = voc(tmp_path / "tree")
    (root / "JPEGImages/one.png").unlink()
    put(root / "JPEGImages" / name, image_bytes(1, kind="PNG" if name.endswith("PNG") else "JPEG"))
    outcome = run_import(root)
    assert outcome.report["problems"] == []
    image = next(image for image in read(outcome.tar).images if image.name == name)
    assert image.file.endswith(".png" if name.endswith("PNG") else ".jpg")


def test_of_two_images_of_one_name_the_stated_one_is_used(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "JPEGImages/one.bmp", image_bytes(77, kind="BMP"))
    names = {image.name for image in read(run_import(root).tar).images}
    assert "one.png" in names
    assert "one.bmp" not in names


def test_voc_coordinates_difficult_and_parts(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    box = "<bndbox><xmin>1.5</xmin><ymin> 2 </ymin><xmax>10</xmax><ymax>20.25</ymax></bndbox>"
    more = f"<object><name> cell </name>{part}<difficult>1</difficult>{box}</object>"
    put(root / "Annotations/two.xml", voc_xml([], name="two.png", more=more))
    dataset = read(run_import(root).tar)
    assert dataset.classes == ("blob", "cell")
    (found,) = next(image.boxes for image in dataset.images if image.name == "two.png")
    assert found == canonical.Box(1, 1.5, 2, 10, 20.25, crowd=False, difficult=True)


def test_lists_may_have_a_byte_order_mark_blank_lines_and_crlf(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "ImageSets/Main/train.txt", b"\xef\xbb\xbfone\r\n\r\n  two  \r\n")
    assert run_import(root).results["splits"]["train"]["images"] == 2


# --- COCO ------------------------------------------------------------------------------------------------------------


def test_crowds_and_classes_without_boxes_are_kept(tmp_path: Path, run_import: Import) -> None:
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [1.5, 2, 3, 4]},
    ]
    outcome = run_import(coco(tmp_path / "tree", annotations=annotations))
    image = read(outcome.tar).images[0]
    assert image.boxes == (canonical.Box(0, 1, 2, 4, 6, crowd=True), canonical.Box(0, 1.5, 2, 4.5, 6))
    blob = outcome.report["classes"][1]
    assert blob == {"name": "blob", "splits": {"train": {"images": 0, "boxes": 0}, "val": {"images": 0, "boxes": 0}}}


def test_outlines_become_masks_in_every_form(tmp_path: Path, run_import: Import) -> None:
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8)
    bitmap[5:30, 4:20] = 1
    packed = coco_mask.encode(np.asfortranarray(bitmap))["counts"].decode()
    start = 4 * HEIGHT + 5
    middle = [25, HEIGHT - 25] * 15
    forms = [
        [[4, 5, 20, 5, 20, 30, 4, 30]],
        {"size": [HEIGHT, WIDTH], "counts": packed},
        {"size": [HEIGHT, WIDTH], "counts": [start, *middle, 25, WIDTH * HEIGHT - start - sum(middle) - 25]},
        [],
    ]
    plain = {"image_id": 1, "category_id": 3, "bbox": [4, 5, 16, 25]}
    annotations = [{**plain, "segmentation": form} for form in forms]
    annotations += [plain, {**plain, "iscrowd": 1, "segmentation": forms[1]}]
    outcome = run_import(coco(tmp_path / "tree", annotations=annotations))
    assert outcome.failure is None
    assert outcome.problems() == {"image_without_boxes": ("note", 1)}
    boxes = read(outcome.tar).images[0].boxes
    assert [box.mask for box in boxes] == [packed] * 3 + [None] * 3
    assert outcome.report["masks"] == 3


# --- reading nothing that is not the dataset's -----------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return put(tmp_path / "outside/secret.png", image_bytes(99))


@pytest.mark.parametrize("name", ["../../outside/secret.png", "{absolute}", "a\0.png", "\udce9.png", ".", "n" * 5000])
def test_coco_file_names_cannot_leave_the_dataset(tmp_path: Path, run_import: Import, secret: Path, name: str) -> None:
    root = coco(tmp_path / "tree")
    document = coco_document(["a.png", name.format(absolute=secret)])
    put(root / "annotations/instances_train2017.json", json.dumps(document))
    outcome = run_import(root)
    assert outcome.problems()["missing_image"] == ("dropped", 1)
    outcome.tar.read_bytes().index(b"dataset.json")
    json.dumps(outcome.report, ensure_ascii=False).encode()  # no lone surrogate: databases refuse them


def test_voc_names_cannot_leave_the_dataset(tmp_path: Path, run_import: Import, secret: Path) -> None:
    root = voc(tmp_path / "tree")
    put(secret.parent / "secret.xml", voc_xml([GOOD_BOX]))
    put(root / "ImageSets/Main/train.txt", f"one\n../../outside/secret\n{secret.with_suffix('')}\n")
    assert run_import(root).problems()["missing_annotation"] == ("dropped", 2)


def test_links_are_followed_inside_the_dataset_only(tmp_path: Path, run_import: Import, secret: Path) -> None:
    root = voc(tmp_path / "tree")
    inside = put(root / "store/one.png", image_bytes(1))
    (root / "JPEGImages/one.png").unlink()
    (root / "JPEGImages/one.png").symlink_to(inside)
    (root / "JPEGImages/two.png").unlink()
    (root / "JPEGImages/two.png").symlink_to(secret)
    outcome = run_import(root)
    assert outcome.examples("missing_image") == [
        {"file": "two.png", "detail": "two.png is a link out of the dataset's directory, which is not followed"}
    ]


@pytest.mark.parametrize("linked", ["ImageSets/Main/train.txt", "Annotations/one.xml"])
def test_linked_annotations_do_not_show_other_files(tmp_path: Path, run_import: Import, linked: str) -> None:
    root = voc(tmp_path / "tree")
    other = put(tmp_path / "outside/passwords", "hunter2\n")
    (root / linked).unlink()
    (root / linked).symlink_to(other)
    outcome = run_import(root)
    assert "hunter2" not in json.dumps(outcome.report)
    assert "link out of" in json.dumps(outcome.report)
