"""Instance masks as runs, as COCO keeps them: from polygons, to and from text, and to bitmaps.

Runs go down the columns, from the left one on: the first counts pixels outside the object (it may be 0), the next
pixels of the object, and so in turns; together they are the image's pixels. As text they are COCO's compressed
`counts`, which its tools read.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.int64]
Points = NDArray[np.float64]

MAX_RUNS = 1_000_000
MAX_CHARACTERS = 7  # of a number in the compressed text: 35 bits
# Times that a polygon may cross the middle line of a column of pixels: it bounds work and memory for one object.
MAX_CROSSINGS = 4_000_000

# The text: five bits a character, the least first, the sixth set where more follow; characters begin at "0".
_BITS, _MORE, _SIGN, _ZERO = 5, 0x20, 0x10, 48


class BadMask(ValueError):
    """An outline or runs that describe no mask; the message says why, of "the segmentation"."""


def rasterise(polygons: Sequence[Points], height: int, width: int) -> Runs:
    """Return the runs of the union of polygons in an image of `height` and `width`.

    A pixel belongs to a polygon if its centre lies inside by the even-odd rule, exactly. COCO's own tool moves the
    corners to fifths of a pixel first: the two differ in pixels whose centre is within a fifth of an edge, no others.

    Args:
        polygons: each (P, 2), x and y in continuous pixel coordinates, finite; they may reach out of the image.
        height: pixels.
        width: pixels.

    Raises:
        BadMask: there would be more than `MAX_CROSSINGS` crossings.
    """
    toggles = [_toggles(polygon, height, width) for polygon in polygons]
    return _runs(_union(toggles) if len(toggles) > 1 else toggles[0], height * width)


def _toggles(polygon: Points, height: int, width: int) -> Runs:
    """Return where, column after column, one gets into the polygon and out of it again: even in number, rising."""
    start, end = polygon, np.roll(polygon, -1, axis=0)
    # The columns between the two ends of an edge, of which it crosses the middle line.
    columns = np.clip(np.ceil(np.stack([start[:, 0], end[:, 0]]) - 0.5), 0, width).astype(np.int64)
    first, counts = columns.min(axis=0), np.abs(columns[1] - columns[0])
    if counts.sum() > MAX_CROSSINGS:
        raise BadMask(f"crosses columns of pixels {counts.sum()} times; at most {MAX_CROSSINGS} are drawn")
    edge = np.repeat(np.arange(len(polygon)), counts)
    column = np.arange(len(edge)) - (np.cumsum(counts) - counts - first)[edge]
    slope = (end[edge, 1] - start[edge, 1]) / (end[edge, 0] - start[edge, 0])
    crossed = start[edge, 1] + (column + 0.5 - start[edge, 0]) * slope
    row = np.clip(np.ceil(crossed - 0.5), 0, height).astype(np.int64)
    return _odd(column * height + row)


def _odd(positions: Runs) -> Runs:
    """Return the positions that occur an odd number of times, rising: in and out at once is neither."""
    values, counts = np.unique(positions, return_counts=True)
    return values[counts % 2 == 1]


def _union(toggles: Sequence[Runs]) -> Runs:
    """Return the toggles of what lies inside of at least one."""
    starts, ends = (np.concatenate([one[side::2] for one in toggles]) for side in (0, 1))
    positions = np.concatenate([starts, ends])
    order = np.argsort(positions, kind="stable")  # of equal ones the starts first: what touches is one
    depth = np.cumsum(np.where(order < len(starts), 1, -1))
    before = np.concatenate([[0], depth[:-1]])
    return positions[order][(depth == 0) | (before == 0)]


def _runs(toggles: Runs, pixels: int) -> Runs:
    inner = toggles[toggles < pixels]
    return np.diff(np.concatenate([[0], inner, [pixels]]))


def check_runs(runs: Runs, pixels: int) -> Runs:
    """Return runs as this module makes them: none of them 0 but the first.

    Raises `BadMask` if one is negative, or if together they are not as many as `pixels`.
    """
    if len(runs) > MAX_RUNS:
        raise BadMask(f"has {len(runs)} runs; at most {MAX_RUNS} are read")
    if not len(runs) or runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise BadMask(f"has counts that are not its {pixels} pixels together")
    return _runs(_odd(np.cumsum(runs)[:-1]), pixels)


def area(runs: Runs) -> int:
    """Return how many pixels the object has."""
    return int(runs[1::2].sum())


def to_bitmap(runs: Runs, height: int, width: int) -> NDArray[np.uint8]:
    """Return (H, W) of 0 and, on the object, 1. Raises `ValueError` if the runs are not of this size."""
    if runs.sum() != height * width:
        raise ValueError(f"runs of {runs.sum()} pixels are no mask of {width}x{height}")
    bitmap = np.zeros((height, width), np.uint8)
    edges = np.cumsum(runs[: len(runs) // 2 * 2])  # up to the object's end
    if len(edges):  # only the columns that it reaches over are written: most objects are small
        left, right = int(edges[0]) // height, -(-int(edges[-1]) // height)
        inside = np.diff(edges, prepend=left * height, append=right * height)
        flat = np.repeat((np.arange(len(inside)) % 2).astype(np.uint8), inside)
        bitmap[:, left:right] = flat.reshape(right - left, height).T
    return bitmap


def to_text(runs: Runs) -> str:
    """Return runs as COCO's compressed `counts`: from the fourth on each is written as what it is more than two before.

    Numbers are written in two's complement, in as few groups of five bits as hold their sign.
    """
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    places = np.arange(MAX_CHARACTERS)
    rest = numbers[:, None] >> (_BITS * places)  # arithmetic: the sign goes along
    # A group is the last one if what is above its sign bit is all sign.
    following = (rest >> (_BITS - 1)) != np.where(numbers < 0, -1, 0)[:, None]
    groups = (rest & (_MORE - 1)) | np.where(following, _MORE, 0)
    written = np.concatenate([np.ones_like(following[:, :1]), following[:, :-1]], axis=1)
    return (groups[written] + _ZERO).astype(np.uint8).tobytes().decode("ascii")


def from_text(text: str) -> Runs:
    """Return the runs that `to_text` wrote, or any of COCO's tools. Raises `BadMask` if the text is none of theirs."""
    groups = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64) - _ZERO
    ends = np.flatnonzero(groups & _MORE == 0)
    if not len(groups) or groups.min() < 0 or groups.max() >= 2 * _MORE or ends[-1:].tolist() != [len(groups) - 1]:
        raise BadMask("has a text that is not COCO's compressed counts")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_CHARACTERS:
        raise BadMask("has a text with a number that is too large")
    place = np.arange(len(groups)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((groups & (_MORE - 1)) << (_BITS * place), starts)
    numbers -= np.where(groups[ends] & _SIGN, np.int64(1) << (_BITS * lengths), 0)
    # Each but the first three is the difference to the one two before.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
