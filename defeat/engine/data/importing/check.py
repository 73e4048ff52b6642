"""The checks between what a format read and the canonical form.

What cannot be used is dropped and counted; what makes the whole useless is fatal. A box must lie in its image as
stored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from defeat.engine.data.archive import Tick
from defeat.engine.data.canonical import AnnotatedImage, Box, CanonicalDataset
from defeat.engine.data.importing.base import Missing, Parsed, RawBox, RawImage
from defeat.engine.data.importing.images import Fault, Inspected, inspect_all
from defeat.engine.data.importing.problems import Problems
from defeat.engine.data.importing.segmentation import runs_of
from defeat.engine.data.masks import BadMask, area, to_text
from defeat.engine.report import RunError, shown

MAX_CLASSES = 10_000


@dataclass(frozen=True, slots=True)
class Checked:
    """A dataset that can be kept, and where the bytes of each image's `file` are now."""

    dataset: CanonicalDataset
    sources: Mapping[str, Path]


def check(parsed: Parsed, problems: Problems, tick: Tick) -> Checked:
    """Decode every image, put every box to the test, and return what is left.

    Recoverable findings go into `problems`; `check_whole` judges them.
    """
    found = inspect_all((image.path for image in parsed.images if isinstance(image.path, Path)), tick)
    kept: list[tuple[RawImage, Inspected]] = []
    sources: dict[str, Path] = {}
    for image in parsed.images:
        result = _inspected_of(image, found)
        if isinstance(result, Fault):
            problems.drop(result.code, image.name, result.detail, images=1, boxes=len(image.boxes))
            continue
        kept.append((image, result))
        assert isinstance(image.path, Path)  # else it would be a Fault
        sources.setdefault(_file_of(result), image.path)
        _note_size(image, result, problems)
    _note_duplicates(kept, problems)
    index = {name: number for number, name in enumerate(parsed.classes)}
    kept.sort(key=lambda pair: (pair[0].split, pair[0].name, pair[1].sha256))
    images = [
        AnnotatedImage(
            id=number,
            file=_file_of(result),
            name=image.name,
            width=result.width,
            height=result.height,
            split=image.split,
            boxes=_boxes_of(image, result, index, problems),
        )
        for number, (image, result) in enumerate(kept, start=1)
    ]
    return Checked(CanonicalDataset(parsed.classes, tuple(images)), sources)


def _inspected_of(image: RawImage, found: Mapping[Path, Inspected | Fault]) -> Inspected | Fault:
    if isinstance(image.path, Missing):
        return Fault("missing_image", image.path.reason)
    return found[image.path]


def _file_of(inspected: Inspected) -> str:
    return f"images/{inspected.sha256}.{inspected.extension}"


def _note_size(image: RawImage, inspected: Inspected, problems: Problems) -> None:
    actual = (inspected.width, inspected.height)
    if image.stated_size is not None and image.stated_size != actual:
        stated = f"{shown(image.stated_size[0])}x{shown(image.stated_size[1])}"
        detail = f"annotated as {stated}, is {inspected.width}x{inspected.height}"
        problems.note("image_size_mismatch", image.name, detail)


def _note_duplicates(kept: list[tuple[RawImage, Inspected]], problems: Problems) -> None:
    first: dict[str, RawImage] = {}
    for image, inspected in kept:
        earlier = first.setdefault(inspected.sha256, image)
        if earlier is image:
            continue
        if earlier.split != image.split:
            detail = f"in {image.split}, and as {shown(earlier.name)} in {earlier.split}"
            problems.note("image_in_two_splits", image.name, detail)
        else:
            problems.note(
                "duplicate_image", image.name, f"the same bytes as {shown(earlier.name)}, both in {image.split}"
            )


def _boxes_of(image: RawImage, inspected: Inspected, index: Mapping[str, int], problems: Problems) -> tuple[Box, ...]:
    boxes = []
    for raw in image.boxes:
        box = _check_box(raw, image, inspected, index[raw.class_name], problems)
        if box is not None:
            boxes.append(box)
    if not boxes:
        problems.note("image_without_boxes", image.name, f"in {image.split}")
    return tuple(boxes)


def _check_box(raw: RawBox, image: RawImage, inspected: Inspected, class_index: int, problems: Problems) -> Box | None:
    corners = (raw.x1, raw.y1, raw.x2, raw.y2)
    detail = f"{shown(raw.class_name)} from ({raw.x1:g}, {raw.y1:g}) to ({raw.x2:g}, {raw.y2:g})"
    where = f"{detail} in an image of {inspected.width}x{inspected.height}"
    if not all(math.isfinite(value) for value in corners):
        problems.drop("bad_box", image.name, detail, boxes=1)
        return None
    if raw.x2 <= raw.x1 or raw.y2 <= raw.y1:
        problems.drop("empty_box", image.name, detail, boxes=1)
        return None
    if raw.x1 >= inspected.width or raw.y1 >= inspected.height or raw.x2 <= 0 or raw.y2 <= 0:
        problems.drop("box_outside", image.name, where, boxes=1)
        return None
    x1, y1 = max(raw.x1, 0.0), max(raw.y1, 0.0)
    x2, y2 = min(raw.x2, float(inspected.width)), min(raw.y2, float(inspected.height))
    if (x1, y1, x2, y2) != corners:
        problems.note("box_clipped", image.name, where)
    mask = _mask_of(raw, image, inspected, where, problems)
    return Box(class_index, x1, y1, x2, y2, crowd=raw.crowd, difficult=raw.difficult, mask=mask)


def _mask_of(raw: RawBox, image: RawImage, inspected: Inspected, where: str, problems: Problems) -> str | None:
    """Return the text of the object's mask in its image; None if it has none, or none that can be used."""
    if raw.segmentation is None:
        return None
    try:
        runs = runs_of(raw.segmentation, inspected.height, inspected.width)
    except BadMask as error:
        problems.drop("bad_mask", image.name, f"the segmentation of {where} {error}")
        return None
    if not area(runs):
        problems.drop("empty_mask", image.name, where)
        return None
    return to_text(runs)


def check_classes(parsed: Parsed, problems: Problems) -> None:
    """Find what is wrong with the classes before any image is opened."""
    if not parsed.classes:
        problems.fatal("no_classes", "", "the annotations name no class; there is nothing to learn")
    if len(parsed.classes) > MAX_CLASSES:
        problems.fatal("too_many_classes", "", f"{len(parsed.classes)} classes; at most {MAX_CLASSES} are allowed")


def check_whole(dataset: CanonicalDataset, problems: Problems, max_dropped_fraction: float) -> None:
    """Judge what is left of the dataset.

    Raises `RunError("data", …)` with `too_many_bad_annotations` if more was dropped than `max_dropped_fraction` (0 to
    1), else with `no_training_split` or `no_training_boxes`.
    """
    if problems.dropped_fraction > max_dropped_fraction:
        counts = ", ".join(f"{problem.count} {problem.code}" for problem in problems if problem.severity == "dropped")
        raise RunError(
            "data",
            "too_many_bad_annotations",
            f"{problems.dropped_fraction:.1%} of images and boxes would be dropped ({counts}); max_dropped_fraction "
            f"allows {max_dropped_fraction:.1%}: mend the annotations or raise it",
        )
    training = dataset.in_split("train")
    if not training:
        problems.fatal("no_training_split", "", "there is no image in a split named train; one is needed")
    elif not any(not box.crowd for inspected in training for box in inspected.boxes):
        problems.fatal("no_training_boxes", "", f"the {len(training)} training images have no box to learn from")
    if not (dataset.in_split("val") or dataset.in_split("test")):
        problems.note("no_evaluation_split", "", "add a val split to see how good a detector is")
    problems.raise_fatal()
