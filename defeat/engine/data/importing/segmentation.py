"""Objects' outlines as COCO annotates them, taken in from strangers: bounded and of the right types, and no more.

A `segmentation` is polygons, `[[x1, y1, x2, y2, …], …]`, or runs, `{"size": [height, width], "counts": …}`, of which
the counts are a list of numbers or the compressed text of one. `defeat.engine.data.masks` makes masks of them.
"""

from array import array
from dataclasses import dataclass

import numpy as np

from defeat.engine.data.masks import MAX_CHARACTERS, MAX_RUNS, BadMask, Runs, check_runs, from_text, rasterise
from defeat.engine.report import shown

# Work and memory for one object are bound by these; what people annotate is a hundredth of it.
MAX_POINTS = 20_000

# Farther out no image reaches, and what is computed with such numbers stays finite.
_MOST_COORDINATE = 1e7
_MOST_COUNT = 2**31
_LEAST_POINTS = 3


@dataclass(frozen=True, slots=True)
class Polygons:
    """The parts of an object, each x1, y1, x2, y2, … in continuous pixel coordinates.

    They are finite, may reach out of the image, and have three points or more.
    """

    parts: "tuple[array[float], ...]"  # an array is generic to type checkers only


@dataclass(frozen=True, slots=True)
class RunLengths:
    """An object's runs, as numbers from 0 or as text, and the height and width that the annotation states for them."""

    counts: "array[int] | str"
    size: tuple[int, int]


Segmentation = Polygons | RunLengths


def read_segmentation(value: object) -> Segmentation | None:
    """Return what an annotation's `segmentation` describes; None if it is null or empty, and so there is none.

    Raises:
        BadMask: it is neither form, too large, or has a number that cannot be one.
    """
    if value is None or value == [] or value == {}:
        return None
    if isinstance(value, list):
        return _read_polygons(value)
    if isinstance(value, dict):
        return _read_runs(value)
    raise BadMask(f"is neither polygons nor runs: {shown(value)}")


def runs_of(segmentation: Segmentation, height: int, width: int) -> Runs:
    """Return the runs of an object in its image of `height` and `width` pixels.

    Raises:
        BadMask: runs that are of another size or cannot be; polygons with too many crossings.
    """
    if isinstance(segmentation, Polygons):
        return rasterise([np.array(part).reshape(-1, 2) for part in segmentation.parts], height, width)
    if segmentation.size != (height, width):
        stated = f"{segmentation.size[1]}x{segmentation.size[0]}"
        raise BadMask(f"is of an image of {stated}, and this is one of {width}x{height}")
    counts = segmentation.counts
    runs = from_text(counts) if isinstance(counts, str) else np.array(counts, np.int64)
    return check_runs(runs, height * width)


def _read_polygons(value: list[object]) -> Polygons:
    parts, points = [], 0
    for part in value:
        if not isinstance(part, list) or len(part) % 2 or len(part) < 2 * _LEAST_POINTS:
            raise BadMask(f"needs polygons [x1, y1, x2, y2, …] of {_LEAST_POINTS} points or more, not {shown(part)}")
        points += len(part) // 2
        if points > MAX_POINTS:
            raise BadMask(f"has more than {MAX_POINTS} points, which are not read")
        # Compared before they become floats: an integer may be too large for one. NaN is within no bounds.
        wrong = [one for one in part if not (_is_number(one) and -_MOST_COORDINATE <= one <= _MOST_COORDINATE)]
        if wrong:
            raise BadMask(f"has the coordinate {shown(wrong[0])}; they are numbers of at most {_MOST_COORDINATE:g} px")
        parts.append(array("d", part))
    return Polygons(tuple(parts))


def _read_runs(value: dict[object, object]) -> RunLengths:
    size, counts = value.get("size"), value.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_count, size))):
        raise BadMask(f"needs a size [height, width], not {shown(size)}")
    stated = (size[0], size[1])
    if isinstance(counts, str) and len(counts) <= MAX_RUNS * MAX_CHARACTERS:
        return RunLengths(counts, stated)
    if not isinstance(counts, list) or len(counts) > MAX_RUNS:
        raise BadMask(f"needs counts, a text or a list, of at most {MAX_RUNS} numbers, not {shown(counts)}")
    if wrong := [one for one in counts if not _is_count(one)]:
        raise BadMask(f"has the count {shown(wrong[0])}; they are whole numbers from 0 to {_MOST_COUNT}")
    return RunLengths(array("q", counts), stated)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_COUNT
