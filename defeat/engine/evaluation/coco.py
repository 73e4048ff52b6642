"""COCO's metrics of boxes and masks, on arrays: pycocotools' numbers to the last digits, without its loops.

The procedure is that of pycocotools (`COCOeval`; Lin et al., "Microsoft COCO", ECCV 2014, and its evaluation page). In
each image and class the detections, best first and 100 at most, take the ground truth with which they overlap most;
then all of a class's detections, best first, give precision as a function of recall. What makes it fast: only pairs
that overlap by 0.5 at least can match, so everything past the overlaps is done for those alone, for all thresholds,
areas and images at once; every other detection is a false positive, and is only counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Common = Callable[[Ints, Ints], Floats]

THRESHOLDS: Final[Floats] = np.linspace(0.5, 0.95, 10)  # of overlap (intersection over union)
RECALLS: Final[Floats] = np.linspace(0.0, 1.0, 101)
# Boxes outside a range are neither asked for nor counted as false, in square pixels: all, small, medium, large.
AREAS: Final[Floats] = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])
MOST_DETECTIONS: Final = (1, 10, 100)  # per image and class


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Boxes of many images, in a row, or objects with masks.

    Attributes:
        image: (N,) which image, from 0.
        label: (N,) which class, from 0.
        corner: (N, 2) x and y of the upper left corner, pixels.
        side: (N, 2) width and height, pixels.
        pixels: (N,) how many each one's mask has; None: the objects are the boxes.
    """

    image: Ints
    label: Ints
    corner: Floats
    side: Floats
    pixels: Floats | None = None

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, chosen: Ints | Bools) -> "Boxes":
        return Boxes(
            image=self.image[chosen],
            label=self.label[chosen],
            corner=self.corner[chosen],
            side=self.side[chosen],
            pixels=None if self.pixels is None else self.pixels[chosen],
        )

    @property
    def area(self) -> Floats:
        """Return (N,) square pixels."""
        return np.asarray(self.side[:, 0] * self.side[:, 1]) if self.pixels is None else self.pixels


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What the metrics are means of; -1 where a class has no ground truth.

    Attributes:
        precision: (10 thresholds, 101 recalls, classes, 4 areas), of 100 detections.
        recall: (10 thresholds, classes, 4 areas, 3 numbers of detections), the largest reached.
    """

    precision: Floats
    recall: Floats


def curves(
    truth: Boxes, crowd: Bools, found: Boxes, scores: Floats, *, classes: int, common: Common | None = None
) -> Curves:
    """Return precision and recall of detections.

    Args:
        truth: ground truth, in the order of its annotation.
        crowd: (len(truth),) regions that may match many times, and need not be found.
        found: detections, in any order.
        scores: (len(found),); equal ones keep their order.
        classes: how many there are.
        common: how many pixels the masks of detections and of ground truth share, both by their place in `found` and
            `truth`: called with pairs of one image and class. None: what their boxes share counts.
    """
    assert not len(found) or (found.label.min() >= 0 and found.label.max() < classes), "a detection of no known class"
    order = np.lexsort((-scores, found.image * classes + found.label))
    rank = _position_in_run((found.image * classes + found.label)[order])
    order, rank = order[rank < MOST_DETECTIONS[-1]], rank[rank < MOST_DETECTIONS[-1]]
    found, scores = found[order], scores[order]

    ignored = _outside(truth.area) | crowd

    def _common(left: Ints, right: Ints) -> Floats:
        return _common_area(found[left], truth[right]) if common is None else common(order[left], right)

    pairs = _pairs(truth, crowd, found, classes, _common)
    candidates, matched, excused = _match(pairs, crowd, ignored, rank)
    asked = np.stack([np.bincount(truth.label[~out], minlength=classes) for out in ignored])  # (areas, classes)
    tally = _tally(found, scores, rank, candidates, matched, excused)
    return _accumulate(tally, asked, classes)


def _position_in_run(keys: Ints) -> Ints:
    """Return how many equal keys stand right before each: (N,)."""
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    return np.arange(len(keys)) - np.repeat(starts, np.diff(np.append(starts, len(keys))))


def _outside(area: Floats) -> Bools:
    """Return for each range of areas whether a box is outside: (4, N)."""
    return (area < AREAS[:, :1]) | (area > AREAS[:, 1:])


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Detections and ground truth of one image and class that may match, by detection, then overlap, then truth."""

    found: Ints
    truth: Ints
    overlap: Floats


def _pairs(truth: Boxes, crowd: Bools, found: Boxes, classes: int, common: Common) -> _Pairs:
    """Return all pairs of one image and class that overlap by the least threshold; `found` is sorted by these two."""
    key = truth.image * classes + truth.label
    by_key = np.argsort(key, kind="stable")
    wanted = found.image * classes + found.label
    first, last = (np.searchsorted(key[by_key], wanted, side=side) for side in ("left", "right"))
    many = last - first
    left = np.repeat(np.arange(len(found)), many)
    within = np.arange(len(left)) - np.repeat(np.cumsum(many) - many, many)
    right = by_key[np.repeat(first, many) + within]
    overlap = _overlaps(found.area[left], truth.area[right], crowd[right], common(left, right))
    near = overlap >= THRESHOLDS[0]
    left, right, overlap = left[near], right[near], overlap[near]
    order = np.lexsort((right, overlap, left))
    return _Pairs(found=left[order], truth=right[order], overlap=overlap[order])


def _overlaps(found: Floats, truth: Floats, crowd: Bools, common: Floats) -> Floats:
    """Intersection over union, (N,), by areas; over the detection's own area where the truth is a crowd."""
    union = np.where(crowd, found, found + truth - common)
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _common_area(found: Boxes, truth: Boxes) -> Floats:
    """Return what each box of one shares with the other's of the same place, (N,), square pixels."""
    low = np.maximum(found.corner, truth.corner)
    high = np.minimum(found.corner + found.side, truth.corner + truth.side)
    sides = np.maximum(high - low, 0)
    return np.asarray(sides[:, 0] * sides[:, 1])


def _match(pairs: _Pairs, crowd: Bools, ignored: Bools, rank: Ints) -> tuple[Ints, Bools, Bools]:
    """Give each detection its ground truth, best detections first.

    Among the ground truth that overlaps enough and is not taken (a crowd never is), one that is asked for comes before
    one that is ignored, then the larger overlap, then the later one.

    Returns:
        candidates: (C,) the detections that overlap anything, by index, rising.
        matched: (4 areas, 10 thresholds, C) whether each got one.
        excused: likewise, whether what it got is ignored.
    """
    candidates, starts = np.unique(pairs.found, return_index=True)
    ends = np.append(starts[1:], len(pairs.found))
    shape = (len(AREAS), len(THRESHOLDS))
    matched, excused = np.zeros((*shape, len(candidates)), bool), np.zeros((*shape, len(candidates)), bool)
    taken = np.zeros((*shape, ignored.shape[1]), bool)
    areas = np.arange(len(AREAS))[:, None, None]
    # An image's detections of a class wait for each other, those of different ones do not: all of one rank together.
    by_rank = np.argsort(rank[candidates], kind="stable")
    for turn in np.split(by_rank, np.flatnonzero(np.diff(rank[candidates][by_rank])) + 1) if len(candidates) else []:
        lengths = ends[turn] - starts[turn]
        heads = np.cumsum(lengths) - lengths
        chosen = np.repeat(starts[turn] - heads, lengths) + np.arange(lengths.sum())
        truth = pairs.truth[chosen]
        free = (pairs.overlap[chosen] >= THRESHOLDS[:, None]) & (~taken[:, :, truth] | crowd[truth])
        # Pairs of a detection are sorted by overlap: the last free one is best, an ignored one only if no other is.
        worth = np.where(free, np.arange(1, len(chosen) + 1) + len(chosen) * ~ignored[:, None, truth], 0)
        best = np.maximum.reduceat(worth, heads, axis=2)
        got = best > 0
        winner = truth[(best - 1) % max(len(chosen), 1)]
        matched[:, :, turn] = got
        excused[:, :, turn] = got & ignored[areas, winner]
        area, threshold, place = np.nonzero(got)
        taken[area, threshold, winner[area, threshold, place]] = True
    return candidates, matched, excused


@dataclass(frozen=True, kw_only=True)
class _Tally:
    """True and false positives, over detections by class and falling score.

    Attributes:
        labels: (C,) classes of the detections that overlap anything.
        rank: (C,) their rank in image and class.
        true: (4 areas, 10 thresholds, C) whether each is a true positive.
        before: (4, 10, C) how many false positives there are up to each, since its class began.
    """

    labels: Ints
    rank: Ints
    true: Bools
    before: Ints


def _tally(found: Boxes, scores: Floats, rank: Ints, candidates: Ints, matched: Bools, excused: Bools) -> _Tally:
    outside = _outside(found.area)  # (areas, detections)
    alone = np.ones(len(found), bool)
    alone[candidates] = False
    order = np.lexsort((-scores, found.label))
    # Those that overlap nothing are false unless they are outside of the area, whatever the threshold.
    plain = np.cumsum((~outside & alone)[:, order], axis=1, dtype=np.int64)
    place = np.empty(len(found), np.int64)
    place[order] = np.arange(len(found))

    sorting = np.argsort(place[candidates])
    candidates, matched, excused = candidates[sorting], matched[:, :, sorting], excused[:, :, sorting]
    labels = found.label[candidates]
    false = ~matched & ~outside[:, None, candidates]
    total = np.cumsum(false, axis=2, dtype=np.int64) + plain[:, None, place[candidates]]
    # What earlier classes had, to be taken off.
    begin = np.searchsorted(found.label[order], labels, side="left")
    earlier_plain = np.concatenate([np.zeros((len(AREAS), 1), np.int64), plain], axis=1)[:, begin]
    sums = np.concatenate([np.zeros((*false.shape[:2], 1), np.int64), np.cumsum(false, axis=2)], axis=2)
    earlier = sums[:, :, np.searchsorted(labels, labels, side="left")]
    return _Tally(
        labels=labels,
        rank=rank[candidates],
        true=matched & ~excused,
        before=total - earlier_plain[:, None] - earlier,
    )


def _accumulate(tally: _Tally, asked: Ints, classes: int) -> Curves:
    precision = -np.ones((len(THRESHOLDS), len(RECALLS), classes, len(AREAS)))
    recall = -np.ones((len(THRESHOLDS), classes, len(AREAS), len(MOST_DETECTIONS)))
    bounds = np.searchsorted(tally.labels, np.arange(classes + 1))
    for label, area in zip(*np.nonzero(asked.T), strict=True):
        part, count = slice(bounds[label], bounds[label + 1]), asked[area, label]
        true = tally.true[area, :, part]
        for index, most in enumerate(MOST_DETECTIONS):
            recall[:, label, area, index] = true[:, tally.rank[part] < most].sum(axis=1) / count
        hits = np.cumsum(true, axis=1)
        # pycocotools' own epsilon. False positives after the last of these only lower what is never read.
        exact = hits / (tally.before[area, :, part] + hits + np.spacing(1))
        envelope = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
        for threshold in range(len(THRESHOLDS)):
            reached = np.searchsorted(hits[threshold] / count, RECALLS, side="left")
            precision[threshold, :, label, area] = np.append(envelope[threshold], 0.0)[reached]
    return Curves(precision=precision, recall=recall)
