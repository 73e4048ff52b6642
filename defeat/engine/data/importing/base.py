"""What a dataset format is: how it recognises a directory, and what it reads from one.

A format reads annotations and finds images; it never opens an image. What it cannot read it reports and leaves out.
Everything it is pointed at may be hostile: files are reached through `Source`, which follows no path out of it.
"""

import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from defeat.engine.data.archive import Tick
from defeat.engine.data.canonical import Split
from defeat.engine.data.importing.problems import Problems
from defeat.engine.data.importing.segmentation import Segmentation
from defeat.engine.report import shown

_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_MAX_CLASS_NAME = 200


def split_of(name: str) -> Split | None:
    """Return the split that a file or folder is named after (`train2017`, `valid`), or None."""
    word = re.match(r"[A-Za-z]*", name)
    return _SPLIT_NAMES.get(word.group().lower()) if word else None


def is_class_name(value: object) -> bool:
    """Say whether `value` can name a class: 1 to 200 characters, none of them control characters or lone surrogates."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= _MAX_CLASS_NAME
        and not any(ord(c) < 32 or 127 <= ord(c) < 160 or "\ud800" <= c <= "\udfff" for c in value)
    )


def is_litter(name: str) -> bool:
    """Say whether a folder or file is none of the dataset's: macOS resource forks, hidden files."""
    return name.startswith(".") or name == "__MACOSX"


class Unreadable(Exception):
    """A file that cannot be read as part of the dataset; the message says why."""


@dataclass(frozen=True, slots=True)
class Missing:
    """An image that is not there, and why."""

    reason: str


class Source:
    """A dataset's files as they came: the directory `root`, which nothing leads out of."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def shown(self, path: Path) -> str:
        """Return `path` relative to the root, for messages."""
        return shown(path.relative_to(self.root).as_posix())

    def locate(self, folders: tuple[Path, ...], name: str) -> Path | Missing:
        """Return the first regular file `name` (a relative path with `/`) under `folders`."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "\0" in name or not _is_unicode(name):
            return Missing(f"'{shown(name)}' is not a plain relative path")
        for folder in folders:
            try:
                found = self._inside(folder.joinpath(*parts))
            except Unreadable as error:
                return Missing(str(error))
            if found is not None:
                return found
        where = ", ".join(self.shown(folder) + "/" for folder in folders)
        return Missing(f"{shown(name)} is not in {where}")

    def read(self, path: Path, *, limit: int) -> bytes:
        """Return a file's bytes. Raises `Unreadable` if there are more than `limit`, or if it is not a file inside."""
        found = self._inside(path)
        if found is None:
            raise Unreadable("there is no such file")
        size = found.stat().st_size
        if size > limit:
            raise Unreadable(f"the file has {size} bytes; at most {limit} are read")
        try:
            return found.read_bytes()
        except PermissionError as error:
            raise Unreadable("the service may not read the file") from error

    def read_json(self, path: Path, *, limit: int) -> Any:
        """Return a JSON file's content. Raises `Unreadable`."""
        try:
            return json.loads(self.read(path, limit=limit))
        except RecursionError as error:
            raise Unreadable("the JSON is nested too deeply") from error
        except ValueError as error:  # also bytes that are not UTF-8, and integers of thousands of digits
            raise Unreadable(f"this is not JSON: {shown(str(error))}") from error

    def _inside(self, path: Path) -> Path | None:
        """Resolve links; None if there is no regular file. Raises `Unreadable` for a link out of the dataset."""
        try:
            real = path.resolve(strict=True)
            mode = real.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, RuntimeError) as error:  # a name too long, a link to itself, no permission
            raise Unreadable(f"{shown(path.name)} cannot be opened: {shown(str(error.args[-1]))}") from error
        if not real.is_relative_to(self.root):
            raise Unreadable(f"{shown(path.name)} is a link out of the dataset's directory, which is not followed")
        return real if stat.S_ISREG(mode) else None


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawBox:
    """A box as annotated: corners in continuous pixel coordinates, any number at all; the checks come later.

    `segmentation` is its object's outline, where the annotation has one.
    """

    class_name: str
    x1: float
    y1: float
    x2: float
    y2: float
    crowd: bool = False
    difficult: bool = False
    segmentation: Segmentation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RawImage:
    """An image as annotated.

    Attributes:
        name: the image's name, relative to the folder of images: not the whole path, which changes with the packing.
        path: where the image is.
        split: which split lists it.
        stated_size: width and height by the annotation, pixels; None if it states none.
        boxes: those that could be read.
    """

    name: str
    path: Path | Missing
    split: Split
    stated_size: tuple[int, int] | None
    boxes: tuple[RawBox, ...]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a format read: class names by index, and images in the source's order."""

    classes: tuple[str, ...]
    images: tuple[RawImage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One dataset format.

    Attributes:
        name: the name in the API.
        title: the name for people.
        layout: what a directory of this format holds, for people.
        recognise: says whether a directory (not one above or below it) holds the layout.
        parse: reads the directory; counts what is listed and what is left out in the `Problems`. Its `Tick` takes the
            fraction done.
    """

    name: str
    title: str
    layout: str
    recognise: Callable[[Path], bool]
    parse: Callable[[Source, Path, Problems, Tick], Parsed]
