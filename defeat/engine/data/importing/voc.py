"""Pascal VOC: one XML file an image, and lists of the images of each split.

Coordinates are used as they stand, as continuous pixel coordinates: `xmin` 1 is one pixel from the left edge, and a box
from 10 to 20 is 10 wide. (The original VOC counts pixels from 1 with both ends inside, which shifts and widens boxes by
at most one pixel; most tools that write this format today do not.)
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from defeat.engine.data.archive import Tick
from defeat.engine.data.canonical import Split
from defeat.engine.data.importing.base import (
    Format,
    Missing,
    Parsed,
    RawBox,
    RawImage,
    Source,
    Unreadable,
    is_class_name,
    is_litter,
)
from defeat.engine.data.importing.problems import Problems
from defeat.engine.report import shown

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})

_MAX_XML_BYTES = 16 * 1024 * 1024
_MAX_LIST_BYTES = 256 * 1024 * 1024


class _UnsafeXml(Exception):
    """The file declares a document type or entities."""


def recognise(directory: Path) -> bool:
    """Say whether `directory` has the folders of VOC and a list of at least one split."""
    return (
        (directory / "Annotations").is_dir() and (directory / "JPEGImages").is_dir() and bool(_split_lists(directory))
    )


def _split_lists(directory: Path) -> dict[Split, Path]:
    """Return the list of each split: train and val win over trainval, which alone is train."""
    lists = directory / "ImageSets" / "Main"
    found: dict[Split, Path] = {}
    for split in ("train", "val", "test"):
        if (path := lists / f"{split}.txt").is_file():
            found[split] = path
    both = lists / "trainval.txt"
    if "train" not in found and "val" not in found and both.is_file():
        found = {"train": both, **found}
    return found


def parse(source: Source, directory: Path, problems: Problems, tick: Tick) -> Parsed:
    """Read a VOC directory. Classes are every object's name, sorted."""
    files = _ImageFiles(source, directory / "JPEGImages")
    listed: list[tuple[Split, str]] = []
    for split, path in _split_lists(directory).items():
        listed += [(split, stem) for stem in _read_list(source, path, problems)]
    images: list[RawImage] = []
    for number, (split, stem) in enumerate(listed):
        tick(number / len(listed))
        image = _read_image(source, directory / "Annotations", files, split, stem, problems)
        if image is not None:
            images.append(image)
    return Parsed(tuple(sorted({box.class_name for image in images for box in image.boxes})), tuple(images))


def _read_list(source: Source, path: Path, problems: Problems) -> list[str]:
    try:
        text = source.read(path, limit=_MAX_LIST_BYTES).decode("utf-8-sig")
    except (Unreadable, UnicodeDecodeError) as error:
        problems.fatal("unreadable_annotation", source.shown(path), f"the list of images: {shown(str(error))}")
        return []
    stems = [line.strip() for line in text.splitlines() if line.strip()]
    problems.listed(images=len(stems))
    unique = dict.fromkeys(stems)
    if len(unique) < len(stems):
        seen: set[str] = set()
        for stem in stems:
            if stem in seen:
                problems.drop("duplicate_image_id", source.shown(path), f"'{shown(stem)}' is listed again", images=1)
            seen.add(stem)
    return list(unique)


class _ImageFiles:
    """The images of `JPEGImages`, by their name without extension."""

    def __init__(self, source: Source, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._by_stem: dict[str, list[str]] = {}
        for name in sorted(_files_below(folder)):
            extension = PurePosixPath(name).suffix
            if extension.lower() in EXTENSIONS:
                self._by_stem.setdefault(name.removesuffix(extension), []).append(name)

    def find(self, stem: str, stated_name: str) -> tuple[str, Path | Missing]:
        """Return the name and place of the image `stem`; of several, the one that the annotation states."""
        names = self._by_stem.get(stem)
        if not names:
            return stem, Missing(f"{self._source.shown(self._folder)} has no image {shown(stem)}.*")
        name = next((name for name in names if PurePosixPath(name).name == stated_name), names[0])
        return name, self._source.locate((self._folder,), name)


def _files_below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_litter(name)]
        prefix = Path(parent).relative_to(folder).as_posix()
        yield from (name if prefix == "." else f"{prefix}/{name}" for name in files)


def _read_image(
    source: Source, folder: Path, files: _ImageFiles, split: Split, stem: str, problems: Problems
) -> RawImage | None:
    path = source.locate((folder,), f"{stem}.xml")
    if isinstance(path, Missing):
        problems.drop("missing_annotation", f"{source.shown(folder)}/{stem}.xml", path.reason, images=1)
        return None
    file = source.shown(path)
    try:
        root = _read_xml(source, path)
    except _UnsafeXml as error:
        problems.fatal("unsafe_xml", file, str(error))
        return None
    except Unreadable as error:
        problems.drop("unreadable_annotation", file, str(error), images=1)
        return None
    objects = root.findall("object")
    problems.listed(boxes=len(objects))
    boxes = []
    for number, element in enumerate(objects, start=1):
        try:
            boxes.append(_read_box(element))
        except Unreadable as error:
            problems.drop("unreadable_annotation", file, f"object {number}: {error}", boxes=1)
    name, place = files.find(stem, (root.findtext("filename") or "").strip())
    return RawImage(name=name, path=place, split=split, stated_size=_read_size(root), boxes=tuple(boxes))


def _read_xml(source: Source, path: Path) -> ElementTree.Element:
    data = source.read(path, limit=_MAX_XML_BYTES)
    # UTF-16 and UTF-32 would hide a declaration from the search below; every other encoding that expat takes writes
    # these characters as ASCII does.
    if b"\0" in data:
        raise Unreadable("the XML is not in UTF-8")
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise _UnsafeXml("the file has a DOCTYPE or ENTITY declaration, which is refused; remove it")
    try:
        return ElementTree.fromstring(data)  # noqa: S314  (no declaration: no entity to expand)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two: an unknown encoding
        raise Unreadable(f"this is not XML: {shown(str(error))}") from error


def _read_box(element: ElementTree.Element) -> RawBox:
    name = (element.findtext("name") or "").strip()
    if not is_class_name(name):
        raise Unreadable(f"the name '{shown(name)}' cannot be a class; give it 1 to 200 printable characters")
    corners = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{key}")
        if text is None:
            raise Unreadable(f"{shown(name)} has no bndbox/{key}")
        try:
            corners.append(float(text))
        except ValueError as error:
            raise Unreadable(f"{shown(name)}: {key} '{shown(text)}' is not a number") from error
    x1, y1, x2, y2 = corners
    difficult = (element.findtext("difficult") or "").strip() == "1"
    return RawBox(class_name=name, x1=x1, y1=y1, x2=x2, y2=y2, difficult=difficult)


def _read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    width, height = root.findtext("size/width"), root.findtext("size/height")
    try:
        return (int(width), int(height)) if width and height else None
    except ValueError:
        return None  # a size that is no number states none: the image's own is used anyway


FORMAT = Format(
    name="voc",
    title="Pascal VOC",
    layout="Annotations/*.xml, JPEGImages/ and ImageSets/Main/{train,val,test}.txt",
    recognise=recognise,
    parse=parse,
)
