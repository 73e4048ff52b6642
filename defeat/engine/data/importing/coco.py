"""COCO: one JSON file a split, as COCO itself lays it out and as Roboflow does.

Boxes are `[x, y, width, height]` in continuous pixel coordinates. Classes are ordered by category id. An object's
`segmentation` is read where there is one, but for crowds, which nothing is trained on.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from defeat.engine.data.archive import Tick
from defeat.engine.data.canonical import Split
from defeat.engine.data.importing.base import (
    Format,
    Parsed,
    RawBox,
    RawImage,
    Source,
    Unreadable,
    is_class_name,
    is_litter,
    split_of,
)
from defeat.engine.data.importing.problems import Problems
from defeat.engine.data.importing.segmentation import Segmentation, read_segmentation
from defeat.engine.data.masks import BadMask
from defeat.engine.report import RunError, shown

_ROBOFLOW = "_annotations.coco.json"
_MAX_JSON_BYTES = 2 * 1024**3
_TICK_EVERY = 1000


@dataclass(frozen=True)
class _SplitFiles:
    """One split's annotations, and the folders in which its images may be, the likeliest first."""

    split: Split
    annotations: Path
    folders: tuple[Path, ...]


def recognise(directory: Path) -> bool:
    """Say whether `directory` holds the annotations of at least one split."""
    return bool(_split_files(directory))


def _split_files(directory: Path) -> list[_SplitFiles]:
    found: list[_SplitFiles] = []
    for path in sorted((directory / "annotations").glob("instances_*.json")):
        tag = path.stem.removeprefix("instances_")
        split = split_of(tag)
        if split is not None:
            found.append(_SplitFiles(split, path, _image_folders(directory, tag, split)))
    for folder in _children(directory):
        split = split_of(folder.name)
        if split is not None and (folder / _ROBOFLOW).is_file():
            found.append(_SplitFiles(split, folder / _ROBOFLOW, (folder,)))
    return found


def _image_folders(directory: Path, tag: str, split: Split) -> tuple[Path, ...]:
    """Return where a split's images may lie: its own folder, others named after the split, then those of all."""
    images = directory / "images"
    own = [parent / tag for parent in (directory, images)]
    alike = [folder for parent in (directory, images) for folder in _children(parent) if split_of(folder.name) == split]
    return tuple(folder for folder in dict.fromkeys([*own, *alike, images, directory]) if folder.is_dir())


def _children(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and not is_litter(path.name))


def parse(source: Source, directory: Path, problems: Problems, tick: Tick) -> Parsed:
    """Read a COCO directory.

    Categories are kept whether they have boxes or not, except the root that Roboflow adds: id 0, the supercategory of
    others, with no annotation. Raises `RunError("data", "unknown_layout", …)` if two files annotate one split.
    """
    files = _split_files(directory)
    _check_one_file_a_split(source, files)
    categories = _Categories()
    images: list[RawImage] = []
    for number, split_files in enumerate(files):
        part = _Part(source, split_files, categories, problems, tick, number / len(files), 1 / len(files))
        images += part.read()
    return Parsed(categories.class_names(problems), tuple(images))


def _check_one_file_a_split(source: Source, files: list[_SplitFiles]) -> None:
    first: dict[Split, Path] = {}
    for entry in files:
        other = first.setdefault(entry.split, entry.annotations)
        if other != entry.annotations:
            detail = (
                f"{source.shown(other)} and {source.shown(entry.annotations)} both annotate the split {entry.split}; "
                "keep one of them"
            )
            raise RunError("data", "unknown_layout", detail)


@dataclass
class _Categories:
    """The categories of all files together."""

    names: dict[int, str] = field(default_factory=dict)
    parents: set[str] = field(default_factory=set)
    used: set[int] = field(default_factory=set)

    def add(self, entry: object, file: str, problems: Problems, own: dict[int, str]) -> None:
        """Take one file's category into `own`, that file's, and into all; a wrong one is fatal."""
        if not isinstance(entry, dict) or not _is_int(entry.get("id")) or not is_class_name(entry.get("name")):
            detail = f"the category {shown(entry)} needs an integer id and a name of 1 to 200 printable characters"
            problems.fatal("unreadable_annotation", file, detail)
            return
        number, name = entry["id"], entry["name"]
        known = self.names.setdefault(number, name)
        if number in own or known != name:
            detail = f"category id {shown(number)} is both '{shown(known)}' and '{shown(name)}'; give each id one name"
            problems.fatal("inconsistent_classes", file, detail)
        own[number] = name
        if isinstance(parent := entry.get("supercategory"), str):
            self.parents.add(parent)

    def class_names(self, problems: Problems) -> tuple[str, ...]:
        """Return the class names by category id; the same name twice is fatal."""
        is_root = self.names.get(0) in self.parents and 0 not in self.used
        names = [self.names[number] for number in sorted(self.names) if not (number == 0 and is_root)]
        for name, count in Counter(names).items():
            if count > 1:
                detail = f"{count} categories are named '{shown(name)}'; merge or rename them"
                problems.fatal("inconsistent_classes", "", detail)
        return tuple(names)


@dataclass
class _Image:
    name: str
    size: tuple[int, int] | None
    boxes: list[RawBox] = field(default_factory=list)


@dataclass
class _Part:
    """The reading of one split's file."""

    source: Source
    files: _SplitFiles
    categories: _Categories
    problems: Problems
    tick: Tick
    start: float
    share: float

    def __post_init__(self) -> None:
        self._file = self.source.shown(self.files.annotations)
        self._own: dict[int, str] = {}
        self._images: dict[int | str, _Image] = {}
        self._annotation_ids: set[int | str] = set()

    def read(self) -> list[RawImage]:
        """Return the split's images; a file that cannot be read at all is fatal."""
        self.tick(self.start)
        try:
            content = self.source.read_json(self.files.annotations, limit=_MAX_JSON_BYTES)
            lists = {key: _entries(content, key) for key in ("categories", "images", "annotations")}
        except Unreadable as error:
            self.problems.fatal("unreadable_annotation", self._file, str(error))
            return []
        for entry in lists["categories"]:
            self.categories.add(entry, self._file, self.problems, self._own)
        self.problems.listed(images=len(lists["images"]), boxes=len(lists["annotations"]))
        for number, entry in enumerate(lists["images"]):
            self._tick(number, len(lists["images"]), 0.2)
            self._add_image(number, entry)
        for number, entry in enumerate(lists["annotations"]):
            self._tick(number, len(lists["annotations"]), 0.5)
            self._add_annotation(number, entry)
        return [
            RawImage(
                name=image.name,
                path=self.source.locate(self.files.folders, image.name),
                split=self.files.split,
                stated_size=image.size,
                boxes=tuple(image.boxes),
            )
            for image in self._images.values()
        ]

    def _tick(self, number: int, count: int, base: float) -> None:
        if number % _TICK_EVERY == 0:
            self.tick(self.start + self.share * (base + 0.3 * number / count))

    def _add_image(self, number: int, entry: object) -> None:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            detail = f"images[{number}] needs an id and a file_name: {shown(entry)}"
            self.problems.drop("unreadable_annotation", self._file, detail, images=1)
            return
        if entry["id"] in self._images:
            detail = f"images[{number}] ({shown(entry['file_name'])}) has the id {shown(entry['id'])} again"
            self.problems.drop("duplicate_image_id", self._file, detail, images=1)
            return
        size = (entry.get("width"), entry.get("height"))
        stated = cast(tuple[int, int], size) if all(_is_int(side) for side in size) else None
        self._images[entry["id"]] = _Image(entry["file_name"], stated)

    def _add_annotation(self, number: int, entry: object) -> None:
        where = f"annotations[{number}]"
        try:
            annotation, corners = _check_annotation(entry)
        except Unreadable as error:
            self.problems.drop("unreadable_annotation", self._file, f"{where} {error}", boxes=1)
            return
        problem = self._reference_problem(annotation)
        if problem is not None:
            code, detail = problem
            self.problems.drop(code, self._file, f"{where} {detail}", boxes=1)
            return
        x, y, width, height = corners
        category = annotation["category_id"]
        self.categories.used.add(category)
        crowd = annotation.get("iscrowd") in (1, True)
        box = RawBox(
            class_name=self._own[category],
            x1=x,
            y1=y,
            x2=x + width,
            y2=y + height,
            crowd=crowd,
            segmentation=None if crowd else self._segmentation(where, annotation),
        )
        self._images[annotation["image_id"]].boxes.append(box)

    def _segmentation(self, where: str, annotation: dict[str, Any]) -> Segmentation | None:
        try:
            return read_segmentation(annotation.get("segmentation"))
        except BadMask as error:
            self.problems.drop("bad_mask", self._file, f"the segmentation of {where} {error}")
            return None

    def _reference_problem(self, annotation: dict[str, Any]) -> tuple[str, str] | None:
        identifier = annotation.get("id")
        if identifier is not None:  # evaluation tools need ids, training does not
            if identifier in self._annotation_ids:
                return "duplicate_annotation_id", f"has the id {shown(identifier)} again"
            self._annotation_ids.add(identifier)
        if annotation["image_id"] not in self._images:
            return "unknown_image_id", f"belongs to image {shown(annotation['image_id'])}, which is not listed"
        if annotation["category_id"] not in self._own:
            return "unknown_class_id", f"has category {shown(annotation['category_id'])}, which is not listed"
        return None


def _entries(content: object, key: str) -> list[Any]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise Unreadable(f"the file needs a list {key!r} at the top")
    return entries


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return _is_int(value) or isinstance(value, str)


def _check_annotation(entry: object) -> tuple[dict[str, Any], list[float]]:
    """Return an annotation whose ids have the right types, and its box. Raises `Unreadable`."""
    if not isinstance(entry, dict):
        raise Unreadable(f"is not an object: {shown(entry)}")
    for key in ("image_id", "category_id"):
        if not _is_id(entry.get(key)):
            raise Unreadable(f"needs an integer or string {key}, not {shown(entry.get(key))}")
    if not (entry.get("id") is None or _is_id(entry["id"])):
        raise Unreadable(f"has the id {shown(entry['id'])}, which is neither an integer nor a string")
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_int(v) or isinstance(v, float) for v in box)):
        raise Unreadable(f"needs a bbox [x, y, width, height] of numbers, not {shown(box)}")
    return entry, [_as_float(value) for value in box]


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


FORMAT = Format(
    name="coco",
    title="COCO",
    layout=(
        "annotations/instances_<split>*.json with images in <split>*/, images/<split>*/ or images/, "
        "or <split>/_annotations.coco.json beside its images (split: train, val or test)"
    ),
    recognise=recognise,
    parse=parse,
)
