"""The one form in which datasets are kept and trained on; docs/architecture.md has the format.

A canonical dataset is a directory (or an uncompressed tar of it) of `dataset.json` and `images/`. Boxes are continuous
pixel coordinates of the image as stored: an EXIF orientation is not applied.
"""

import hashlib
import io
import json
import math
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast

from defeat.engine.data import archive
from defeat.engine.report import RunError

Split = Literal["train", "val", "test"]

FORMAT_VERSION: Final = 1
# Of datasets with masks: releases that know none would not find what the content hash says.
MASKS_FORMAT_VERSION: Final = 2
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")

_DOCUMENT: Final = "dataset.json"
_FILE = re.compile(r"images/[0-9a-f]{64}\.[a-z]{3,4}")
_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Box:
    """One box.

    Attributes:
        class_index: index into the dataset's classes, from 0.
        x1, y1, x2, y2: corners in pixels, `0 <= x1 < x2 <= width` and `0 <= y1 < y2 <= height`.
        crowd: the box holds a group (COCO's `iscrowd`): not trained on, matched leniently in evaluation.
        difficult: hard to tell even for people (VOC's `difficult`): kept, and counted as any other box, for COCO's
            metrics know no such mark.
        mask: the object's pixels in the image, as the text of runs (`defeat.engine.data.masks`); None where the data
            has none.
    """

    class_index: int
    x1: float
    y1: float
    x2: float
    y2: float
    crowd: bool = False
    difficult: bool = False
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """One image of one split.

    Attributes:
        id: from 1, unique in the dataset.
        file: `images/<sha256 of the bytes>.<extension>`, relative to the dataset's directory. Two images with the
            same bytes share a file.
        name: the file's name in the source, relative to the folder of images there.
        width, height: pixels, as stored.
        split: train, val or test.
        boxes: may be empty: the image is all background.
    """

    id: int
    file: str
    name: str
    width: int
    height: int
    split: Split
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class CanonicalDataset:
    """Classes, by index, and images, sorted by split and name."""

    classes: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]

    def in_split(self, split: Split) -> tuple[AnnotatedImage, ...]:
        """Return the images of one split."""
        return tuple(image for image in self.images if image.split == split)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return images and boxes of every split that has images: `{"train": {"images": 205, "boxes": 2000}}`."""
        counts: dict[str, dict[str, int]] = {}
        for split in SPLITS:
            if images := self.in_split(split):
                counts[split] = {"images": len(images), "boxes": sum(len(image.boxes) for image in images)}
        return counts

    @property
    def masks(self) -> int:
        """How many boxes have a mask."""
        return sum(box.mask is not None for image in self.images for box in image.boxes)

    @property
    def format_version(self) -> int:
        """What `dataset.json` is written as."""
        return MASKS_FORMAT_VERSION if self.masks else FORMAT_VERSION


def _image_as_json(image: AnnotatedImage) -> dict[str, Any]:
    return {
        "id": image.id,
        "file": image.file,
        "name": image.name,
        "width": image.width,
        "height": image.height,
        "split": image.split,
        "boxes": [_box_as_json(box) for box in image.boxes],
    }


def _box_as_json(box: Box) -> dict[str, Any]:
    document: dict[str, Any] = {
        "class": box.class_index,
        "box": [box.x1, box.y1, box.x2, box.y2],
        "crowd": box.crowd,
        "difficult": box.difficult,
    }
    # Absent, not null: what has no masks keeps its hash.
    return document if box.mask is None else {**document, "mask": box.mask}


def _content_as_json(dataset: CanonicalDataset) -> dict[str, Any]:
    return {"classes": list(dataset.classes), "images": [_image_as_json(image) for image in dataset.images]}


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def content_hash(dataset: CanonicalDataset) -> str:
    """Return `sha256:<hex>` over classes, boxes and images: equal for equal data, however it was packed."""
    return _hash(_content_as_json(dataset))


def _document(dataset: CanonicalDataset) -> bytes:
    content = _content_as_json(dataset)
    document = {"format_version": dataset.format_version, "content_hash": _hash(content), **content}
    return json.dumps(document, allow_nan=False).encode()


def write(directory: Path, dataset: CanonicalDataset, sources: Mapping[str, Path]) -> None:
    """Write the canonical form into `directory`, which must not hold one yet.

    `sources` maps every image's `file` to where its bytes are now.
    """
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for file in sorted({image.file for image in dataset.images}):
        shutil.copyfile(sources[file], directory / file)
    with (directory / _DOCUMENT).open("xb") as document:
        document.write(_document(dataset))


def pack(tar: Path, dataset: CanonicalDataset, sources: Mapping[str, Path], *, tick: Callable[[float], None]) -> None:
    """Write the canonical form as a tar: the same bytes for the same dataset, always.

    `sources` maps every image's `file` to where its bytes are now; `tick` is called with the fraction done, and may
    raise.

    Raises `RunError("data", "source_changed", …)` if an image no longer has the bytes that its name promises.
    """
    files = sorted({image.file for image in dataset.images})
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        document = _document(dataset)
        archive.addfile(_member(_DOCUMENT, len(document)), io.BytesIO(document))
        for number, file in enumerate(files):
            tick(number / len(files))
            with sources[file].open("rb") as source:
                reader = _HashingReader(source)
                size = source.seek(0, io.SEEK_END)
                source.seek(0)
                archive.addfile(_member(file, size), cast(BinaryIO, reader))
            if reader.digest.hexdigest() != Path(file).stem:
                detail = f"{sources[file].name} changed while it was imported; import again when nothing writes to it"
                raise RunError("data", "source_changed", detail)
    tick(1.0)


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)  # owner 0, no owner's name, time 0, mode 0644
    info.size = size
    return info


class _HashingReader:
    """Reads a file for tarfile and hashes what goes by."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        data = self._file.read(size)
        self.digest.update(data)
        return data


def unpack(tar: Path, directory: Path) -> CanonicalDataset:
    """Unpack a canonical dataset's tar into `directory` (made if need be), as safely as an upload, and read it.

    Raises `RunError("infra", "broken_dataset", …)` if the tar is not what `pack` wrote.
    """
    size = tar.stat().st_size
    try:
        # An uncompressed tar holds no more than its own size, and a member takes a block at least.
        archive.unpack(tar, directory, max_bytes=size, max_files=size // tarfile.BLOCKSIZE + 1, tick=lambda _: None)
    except RunError as error:
        raise _broken(f"{tar.name}: {error.detail}") from error
    return read(directory)


def read(directory: Path) -> CanonicalDataset:
    """Read and validate a canonical dataset's `dataset.json`. Images are not opened.

    Raises `RunError("infra", "broken_dataset", …)` if the file is missing or damaged, has another format version, or
    does not hold what its content hash says.
    """
    path = directory / _DOCUMENT
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _broken(f"{directory.name} has no {_DOCUMENT}") from error
    except (ValueError, RecursionError) as error:
        raise _broken(f"{_DOCUMENT} is not JSON: {error}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version not in (FORMAT_VERSION, MASKS_FORMAT_VERSION):
        known = f"{FORMAT_VERSION} and {MASKS_FORMAT_VERSION}"
        raise _broken(f"{_DOCUMENT} has format version {version!r}; this release reads {known}")
    try:
        dataset = _from_json(document)
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(f"{_DOCUMENT} is damaged: {error!r}") from error
    if version != dataset.format_version:
        raise _broken(f"{_DOCUMENT} has format version {version}, and its masks make it {dataset.format_version}")
    # Of the document as it stands: what it says is what was just read, and need not be put together again.
    if _hash({"classes": document["classes"], "images": document["images"]}) != document.get("content_hash"):
        raise _broken(f"{_DOCUMENT} does not hold what its content hash says")
    return dataset


def _broken(detail: str) -> RunError:
    return RunError("infra", "broken_dataset", f"{detail}; import the dataset again")


def _from_json(document: dict[str, Any]) -> CanonicalDataset:
    classes = tuple(document["classes"])
    if not all(isinstance(name, str) for name in classes):
        raise TypeError("a class is not a string")
    return CanonicalDataset(classes, tuple(_image(entry, len(classes)) for entry in document["images"]))


def _image(entry: dict[str, Any], classes: int) -> AnnotatedImage:
    width, height = int(entry["width"]), int(entry["height"])
    if not _FILE.fullmatch(entry["file"]):
        raise ValueError(f"{entry['file']!r} is no image's path")
    if entry["split"] not in SPLITS:
        raise ValueError(f"{entry['split']!r} is no split; known: {', '.join(SPLITS)}")
    boxes = []
    for box in entry["boxes"]:
        x1, y1, x2, y2 = box["box"]
        if not (math.isfinite(x1 + y1 + x2 + y2) and 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(f"the box {box['box']} does not lie in {entry['file']} ({width}x{height})")
        if not 0 <= box["class"] < classes:
            raise ValueError(f"class {box['class']} of {classes}")
        mask = box.get("mask")
        if not (mask is None or isinstance(mask, str)):
            raise TypeError(f"the mask {mask!r} is no text")
        boxes.append(Box(box["class"], x1, y1, x2, y2, crowd=box["crowd"], difficult=box["difficult"], mask=mask))
    return AnnotatedImage(entry["id"], entry["file"], entry["name"], width, height, entry["split"], tuple(boxes))
