"""The registry of dataset formats, and how a dataset's format is found.

A format is one file, which describes it in `FORMAT`, and its name in the loop below. One from outside this package
calls `register`, see `defeat.engine.plugins`.
"""

import os
from pathlib import Path

from defeat.engine import plugins
from defeat.engine.data.importing import coco, voc
from defeat.engine.data.importing.base import Format, is_litter
from defeat.engine.report import RunError, shown

FORMATS: dict[str, Format] = {}
"""Formats by name, in the order in which they registered."""


def register(format_: Format) -> None:
    """Add a format. Raises `ValueError` if there is another one of its name."""
    plugins.add(FORMATS, "dataset format", format_.name, format_)


for _module in (voc, coco):
    register(_module.FORMAT)


def detect_format(root: Path) -> tuple[Format, Path]:
    """Return the format of the one dataset under `root` and the directory that holds it, `root` itself or one below.

    Raises `RunError("data", "unknown_layout", …)` if there is none or more than one.
    """
    found: list[tuple[Format, Path]] = []
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        here = [(format_, directory) for format_ in FORMATS.values() if format_.recognise(directory)]
        found += here
        if not here:  # a dataset's own folders are not searched for others
            waiting += _folders(directory)
    if len(found) == 1:
        return found[0]
    looked_for = "; ".join(f"{format_.title}: {format_.layout}" for format_ in FORMATS.values())
    if found:
        places = ", ".join(sorted(f"{_place(root, at)} ({format_.title})" for format_, at in found[:10]))
        detail = f"{len(found)} datasets were found, which is ambiguous: {places}; send one at a time"
    else:
        entries = sorted(shown(entry.name) for entry in root.iterdir() if not is_litter(entry.name))
        more = f" and {len(entries) - 10} more" if len(entries) > 10 else ""
        top = ", ".join(entries[:10]) + more if entries else "nothing"
        detail = f"no dataset of a known layout was found; looked for {looked_for}. At the top there is: {top}"
    raise RunError("data", "unknown_layout", detail)


def _folders(directory: Path) -> list[Path]:
    with os.scandir(directory) as entries:
        return [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) and not is_litter(e.name)]


def _place(root: Path, directory: Path) -> str:
    return "the top" if directory == root else shown(directory.relative_to(root).as_posix())
