"""Every problem code, by the smallest dataset that has the problem."""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from defeat.engine.data import canonical
from defeat.engine.data.importing import check
from defeat.engine.data.importing import images as importing_images
from defeat.engine.data.importing.problems import MAX_EXAMPLES, SUMMARIES, Problems
from defeat.engine.report import shown
from tests.defeat.engine.data.conftest import Import
from tests.support.datasets import GOOD_BOX, HEIGHT, WIDTH, coco, coco_document, image_bytes, put, voc, voc_xml


def annotation(**changes: Any) -> dict[str, Any]:
    return {"id": 100, "image_id": 1, "category_id": 3, "bbox": [4, 5, 16, 25], **changes}


GOOD = annotation(id=1)


# --- images --------------------------------------------------------------------------------------------------------


def test_missing_image(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    (root / "JPEGImages/one.png").unlink()
    outcome = run_import(root)
    assert outcome.problems() == {"missing_image": ("dropped", 1)}
    assert outcome.report["dropped_fraction"] == pytest.approx(3 / 7)  # it and its two boxes, of 3 images and 4 boxes
    assert outcome.results["splits"]["train"] == {"images": 1, "boxes": 1}


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


BROKEN = {
    "cut": image_bytes(1, (300, 300), "JPEG")[:-400],
    "cut png": image_bytes(1, (300, 300))[:-40],
    "text": b"this is no image",
    "empty": b"",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start ghostscript
    "no pixels": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(3) + b"\x09" + bytes(3) + b"\x09\x08\x02\0\0\0"),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_image(tmp_path: Path, run_import: Import, content: bytes) -> None:
    root = voc(tmp_path / "tree")
    put(root / "JPEGImages/one.png", content)
    assert run_import(root).problems() == {"broken_image": ("dropped", 1)}


@pytest.mark.parametrize("width", [2, 30_000])
def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, run_import: Import, width: int) -> None:
    header = width.to_bytes(4, "big") + (100_000_000 // 2 + 1).to_bytes(4, "big") + b"\x08\x02\0\0\0"
    root = voc(tmp_path / "tree")
    put(root / "JPEGImages/one.png", b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"x"))
    assert run_import(root).problems() == {"image_too_large": ("dropped", 1)}


def test_a_huge_file_is_not_read(tmp_path: Path, run_import: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    root = voc(tmp_path / "tree")
    put(root / "JPEGImages/one.png", image_bytes(1) + bytes(2000))
    monkeypatch.setattr(importing_images, "MAX_FILE_BYTES", 2000)
    assert run_import(root).problems() == {"image_too_large": ("dropped", 1)}


def test_the_true_size_wins(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", voc_xml([GOOD_BOX], name="two.png", size=(HEIGHT, WIDTH)))
    outcome = run_import(root)
    assert outcome.problems() == {"image_size_mismatch": ("note", 1)}
    assert outcome.examples("image_size_mismatch") == [
        {"file": "two.png", "detail": f"annotated as {HEIGHT}x{WIDTH}, is {WIDTH}x{HEIGHT}"}
    ]
    assert {(p.width, p.height) for p in canonical.unpack(outcome.tar, tmp_path / "read").images} == {(WIDTH, HEIGHT)}


def test_an_exif_orientation_is_not_applied(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/one.png", exif=exif)
    assert run_import(root).report["problems"] == []


def test_the_same_image_twice(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    for name in ("two", "three"):
        put(root / f"JPEGImages/{name}.png", image_bytes(1))
    outcome = run_import(root)
    assert outcome.problems() == {"duplicate_image": ("note", 1), "image_in_two_splits": ("note", 1)}
    assert outcome.examples("image_in_two_splits") == [
        {"file": "three.png", "detail": "in val, and as one.png in train"}
    ]
    dataset = canonical.unpack(outcome.tar, tmp_path / "read")
    assert len(dataset.images) == 3
    assert len({image.file for image in dataset.images}) == 1


def test_one_image_is_decoded_once(tmp_path: Path, run_import: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    root = coco(tmp_path / "tree")
    put(root / "annotations/instances_train2017.json", json.dumps(coco_document(["a.png"] * 50)))
    decoded: list[Path] = []
    inspect = importing_images.inspect
    monkeypatch.setattr(importing_images, "inspect", lambda path: decoded.append(path) or inspect(path))
    run_import(root)
    assert len(decoded) == 2


def test_image_without_boxes(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", voc_xml([], name="two.png"))
    outcome = run_import(root)
    assert outcome.problems() == {"image_without_boxes": ("note", 1)}
    assert outcome.results["splits"]["train"] == {"images": 2, "boxes": 2}


# --- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "code"),
    [
        ((5, 5, 5, 9), "empty_box"),
        ((5, 5, 9, 5), "empty_box"),
        ((9, 5, 5, 9), "empty_box"),
        (("nan", 5, 9, 9), "bad_box"),
        ((5, 5, "inf", 9), "bad_box"),
        ((5, "-inf", 9, 9), "bad_box"),
        ((WIDTH, 5, WIDTH + 9, 9), "box_outside"),
        ((5, HEIGHT, 9, HEIGHT + 9), "box_outside"),
        ((-9, 5, 0, 9), "box_outside"),
        ((5, -9, 9, -1), "box_outside"),
        (("", 5, 9, 9), "unreadable_annotation"),
        (("five", 5, 9, 9), "unreadable_annotation"),
    ],
)
def test_boxes_that_are_dropped(tmp_path: Path, run_import: Import, box: tuple[Any, ...], code: str) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", voc_xml([GOOD_BOX, ("cell", *box)], name="two.png"))
    outcome = run_import(root)
    assert outcome.problems() == {code: ("dropped", 1)}
    assert outcome.report["dropped_fraction"] == pytest.approx(1 / 8)  # of 3 images and 5 boxes
    assert outcome.results["splits"]["train"] == {"images": 2, "boxes": 3}
    (warning,) = [event for event in outcome.events if event["type"] == "message"]
    assert (warning["level"], warning["code"]) == ("warn", code)


def test_boxes_over_the_edge_are_clipped(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    box = ("cell", -0.5, -3, WIDTH + 0.001, HEIGHT + 100)
    put(root / "Annotations/two.xml", voc_xml([box], name="two.png"))
    outcome = run_import(root)
    assert outcome.problems() == {"box_clipped": ("note", 1)}
    dataset = canonical.unpack(outcome.tar, tmp_path / "read")
    (clipped,) = next(image.boxes for image in dataset.images if image.name == "two.png")
    assert clipped == canonical.Box(1, 0, 0, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("bbox", "code"),
    [
        ([1, 1, 0, 5], "empty_box"),
        ([1, 1, 5, -5], "empty_box"),
        ([1, 1, float("nan"), 5], "bad_box"),
        ([1, 1, 10**400, 5], "bad_box"),
        ([WIDTH, 1, 5, 5], "box_outside"),
        ([1, 1, 5], "unreadable_annotation"),
        ([1, 1, "5", 5], "unreadable_annotation"),
        ([1, 1, True, 5], "unreadable_annotation"),
        ({}, "unreadable_annotation"),
        (None, "unreadable_annotation"),
    ],
)
def test_coco_boxes_that_are_dropped(tmp_path: Path, run_import: Import, bbox: object, code: str) -> None:
    outcome = run_import(
        coco(tmp_path / "tree", annotations=[GOOD, annotation(id=2, bbox=bbox), annotation(id=3, image_id=2)])
    )
    assert outcome.problems() == {code: ("dropped", 1)}
    assert outcome.results["splits"]["train"] == {"images": 2, "boxes": 2}


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segmentation", "code", "says"),
    [
        ([[1, 2, 3]], "bad_mask", "the segmentation of annotations[1] needs polygons"),
        ({"size": [HEIGHT, WIDTH], "counts": [5]}, "bad_mask", "has counts that are not its 3072 pixels together"),
        ({"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}, "bad_mask", "is of an image of 48x64"),
        ([[100, 1, 110, 1, 110, 9]], "empty_mask", "cell from (1, 1) to (6, 6) in an image of 64x48"),
        ([[1.6, 1.6, 2.4, 1.6, 2.4, 2.4]], "empty_mask", "cell from"),
        ({"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]}, "empty_mask", "cell from"),
    ],
)
def test_a_box_whose_mask_is_of_no_use_stays_without_one(
    tmp_path: Path, run_import: Import, segmentation: object, code: str, says: str
) -> None:
    annotations = [GOOD, annotation(id=2, bbox=[1, 1, 5, 5], segmentation=segmentation), annotation(id=3, image_id=2)]
    outcome = run_import(coco(tmp_path / "tree", annotations=annotations), max_dropped_fraction=0)
    assert outcome.failure is None
    assert outcome.problems() == {code: ("dropped", 1)}
    assert says in outcome.examples(code)[0]["detail"]
    assert outcome.report["dropped_fraction"] == 0
    assert (outcome.report["boxes"], outcome.report["masks"]) == (4, 0)
    (warning,) = [event for event in outcome.events if event["type"] == "message"]
    assert (warning["level"], warning["code"]) == ("warn", code)


# --- annotations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (annotation(category_id=4), "unknown_class_id"),
        (annotation(category_id="3"), "unknown_class_id"),
        (annotation(image_id=9), "unknown_image_id"),
        (annotation(id=1), "duplicate_annotation_id"),
        (annotation(image_id=None), "unreadable_annotation"),
        (annotation(image_id=[1]), "unreadable_annotation"),
        (annotation(category_id=True), "unreadable_annotation"),
        (annotation(id={}), "unreadable_annotation"),
        ({}, "unreadable_annotation"),
        ("text", "unreadable_annotation"),
    ],
)
def test_coco_annotations_that_are_dropped(tmp_path: Path, run_import: Import, entry: object, code: str) -> None:
    outcome = run_import(coco(tmp_path / "tree", annotations=[GOOD, entry, annotation(id=3, image_id=2)]))
    assert outcome.problems() == {code: ("dropped", 1)}
    assert "annotations[1]" in outcome.examples(code)[0]["detail"]
    assert outcome.report["dropped_fraction"] == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"id": 1, "file_name": "b.png"}, "duplicate_image_id"),
        ({"id": 2}, "unreadable_annotation"),
        ({"id": None, "file_name": "b.png"}, "unreadable_annotation"),
        ({"id": 2, "file_name": 5}, "unreadable_annotation"),
        ([], "unreadable_annotation"),
    ],
)
def test_coco_images_that_are_dropped(tmp_path: Path, run_import: Import, entry: object, code: str) -> None:
    outcome = run_import(coco(tmp_path / "tree", images=[{"id": 1, "file_name": "a.png"}, entry], annotations=[GOOD]))
    assert outcome.problems() == {code: ("dropped", 1)}
    assert outcome.report["dropped_fraction"] == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"[" * 200_000,
        b"\xff\xfe",
        b"9" * 5000,
        b'{"images": [], "annotations": []}',
        b'{"images": {}, "annotations": [], "categories": []}',
    ],
)
def test_a_coco_file_that_cannot_be_read_is_fatal(tmp_path: Path, run_import: Import, content: bytes) -> None:
    root = coco(tmp_path / "tree")
    put(root / "annotations/instances_train2017.json", content)
    outcome = run_import(root)
    assert outcome.failure is not None
    assert outcome.failure.code == "unreadable_annotation"
    assert outcome.failure.detail.startswith("annotations/instances_train2017.json: ")
    assert outcome.problems() == {"unreadable_annotation": ("fatal", 1)}
    assert not outcome.tar.exists()


def test_deep_nesting_inside_an_entry(tmp_path: Path, run_import: Import) -> None:
    depth = sys.getrecursionlimit() // 2
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    outcome = run_import(coco(tmp_path / "tree", annotations=[GOOD, annotation(id=2, bbox=nested)]))
    assert outcome.problems()["unreadable_annotation"] == ("dropped", 1)


@pytest.mark.parametrize(
    ("categories", "code"),
    [
        ([], "no_classes"),
        ([{"id": 3, "name": "cell"}, {"id": 3, "name": "blob"}], "inconsistent_classes"),
        ([{"id": 3, "name": "cell"}, {"id": 4, "name": "cell"}], "inconsistent_classes"),
        (
            [{"id": 3, "name": "blob"}, {"id": 7, "name": "cell"}],
            "inconsistent_classes",
        ),  # the val file has them otherwise
        ([{"id": "3", "name": "cell"}], "unreadable_annotation"),
        ([{"id": 3, "name": ""}], "unreadable_annotation"),
        ([{"id": 3, "name": "a\u0000b"}], "unreadable_annotation"),
        ([{"id": 3, "name": "\ud800"}], "unreadable_annotation"),
        ([{"id": 3, "name": "x" * 201}], "unreadable_annotation"),
        (["cell"], "unreadable_annotation"),
    ],
)
def test_wrong_classes_are_fatal(tmp_path: Path, run_import: Import, categories: object, code: str) -> None:
    root = coco(tmp_path / "tree", categories=categories)
    if not categories:
        (root / "annotations/instances_val2017.json").unlink()
    outcome = run_import(root)
    assert outcome.failure is not None
    assert outcome.failure.code == code
    assert outcome.problems()[code][0] == "fatal"


def test_too_many_classes(tmp_path: Path, run_import: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_CLASSES", 1)
    outcome = run_import(voc(tmp_path / "tree"))
    assert outcome.failure is not None
    assert outcome.failure.code == "too_many_classes"


def test_missing_annotation(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    (root / "Annotations/two.xml").unlink()
    outcome = run_import(root)
    assert outcome.problems() == {"missing_annotation": ("dropped", 1)}
    assert outcome.examples("missing_annotation")[0]["file"] == "Annotations/two.xml"
    assert outcome.report["dropped_fraction"] == pytest.approx(1 / 6)


def test_a_voc_image_listed_twice(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "ImageSets/Main/train.txt", "one\ntwo\none\n")
    assert run_import(root).problems() == {"duplicate_image_id": ("dropped", 1)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<annotation>",
        b"<a/><b/>",
        voc_xml([GOOD_BOX]).encode("utf-16"),
        b"<?xml version='1.0' encoding='klingon'?><a/>",
    ],
)
def test_a_voc_file_that_cannot_be_read_is_dropped(tmp_path: Path, run_import: Import, content: bytes) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", content)
    assert run_import(root).problems() == {"unreadable_annotation": ("dropped", 1)}


@pytest.mark.parametrize(
    "more", ["<object/>", "<object><name>cell</name></object>", "<object><name>a&#133;b</name></object>"]
)
def test_a_voc_object_that_lacks_a_part_is_dropped(tmp_path: Path, run_import: Import, more: str) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", voc_xml([GOOD_BOX], name="two.png", more=more))
    outcome = run_import(root)
    assert outcome.problems() == {"unreadable_annotation": ("dropped", 1)}
    assert outcome.examples("unreadable_annotation")[0]["detail"].startswith("object 2: ")


LAUGHS = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><annotation><filename>&c;</filename></annotation>'


@pytest.mark.parametrize("content", [LAUGHS.encode(), LAUGHS.encode("utf-16"), b"<a><!-- <!DOCTYPE --></a>"])
def test_document_types_and_entities_are_refused(tmp_path: Path, run_import: Import, content: bytes) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", content)
    outcome = run_import(root)
    if b"\0" in content:  # hidden in UTF-16, which is not read at all
        assert outcome.problems() == {"unreadable_annotation": ("dropped", 1)}
    else:
        assert outcome.failure is not None
        assert outcome.failure.code == "unsafe_xml"
        assert outcome.problems() == {"unsafe_xml": ("fatal", 1)}


def test_a_split_list_that_is_no_text_is_fatal(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "ImageSets/Main/val.txt", b"\xff\xff")
    outcome = run_import(root)
    assert outcome.failure is not None
    assert outcome.failure.code == "unreadable_annotation"


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [None, "", "gone\n"])
def test_no_training_split(tmp_path: Path, run_import: Import, train: str | None) -> None:
    root = voc(tmp_path / "tree")
    if train is None:
        (root / "ImageSets/Main/train.txt").unlink()
    else:
        put(root / "ImageSets/Main/train.txt", train)
    outcome = run_import(root)
    assert outcome.failure is not None
    assert outcome.failure.code == "no_training_split"
    assert outcome.problems()["no_training_split"] == ("fatal", 1)
    assert outcome.report["splits"] == {"val": {"images": 1, "boxes": 1}}


@pytest.mark.parametrize("annotations", [[], [annotation(iscrowd=1)]])
def test_no_training_boxes(tmp_path: Path, run_import: Import, annotations: list[Any]) -> None:
    outcome = run_import(coco(tmp_path / "tree", annotations=annotations))
    assert outcome.failure is not None
    assert outcome.failure.code == "no_training_boxes"


def test_no_classes_in_voc(tmp_path: Path, run_import: Import) -> None:
    outcome = run_import(voc(tmp_path / "tree", {"train": {"one": []}, "val": {"two": []}}))
    assert outcome.failure is not None
    assert outcome.failure.code == "no_classes"


def test_no_evaluation_split(tmp_path: Path, run_import: Import) -> None:
    outcome = run_import(voc(tmp_path / "tree", {"train": {"one": [GOOD_BOX]}}))
    assert outcome.problems() == {"no_evaluation_split": ("note", 1)}
    assert outcome.failure is None


def test_max_dropped_fraction_is_exact(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", voc_xml([GOOD_BOX, ("cell", 5, 5, 5, 9)], name="two.png"))
    assert run_import(root, max_dropped_fraction=0.125).failure is None  # one of 3 images and 5 boxes
    outcome = run_import(root, max_dropped_fraction=0.1249)
    assert outcome.failure is not None
    assert outcome.failure.code == "too_many_bad_annotations"
    assert "1 empty_box" in outcome.failure.detail
    assert "12.5%" in outcome.failure.detail
    assert outcome.problems() == {"too_many_bad_annotations": ("fatal", 1), "empty_box": ("dropped", 1)}
    assert (outcome.report["images"], outcome.report["boxes"]) == (3, 4)
    assert not outcome.tar.exists()


def test_examples_are_few_and_counts_complete(tmp_path: Path, run_import: Import) -> None:
    root = voc(tmp_path / "tree")
    put(root / "Annotations/two.xml", voc_xml([GOOD_BOX] + [("cell", n, 5, n, 9) for n in range(30)], name="two.png"))
    outcome = run_import(root)
    assert outcome.problems() == {"empty_box": ("dropped", 30)}
    assert len(outcome.examples("empty_box")) == MAX_EXAMPLES


def test_every_code_has_a_summary_and_a_severity() -> None:
    problems = Problems()
    for code in SUMMARIES:
        problems.note(code, "x", "y")
    assert all(problem.as_json()["summary"] for problem in problems)
    assert problems.dropped_fraction == 0


def test_shown_text_is_short_and_printable() -> None:
    assert shown("a\nb\x1b\udce9") == r"a\nb\x1b\udce9"
    assert len(shown("\n" * 10_000)) <= 200
    assert len(shown(["x" * 10_000] * 10_000)) <= 200
