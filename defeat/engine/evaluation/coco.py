"""COCO's metrics of boxes and masks, on arrays: the same numbers as pycocotools, without its loops.

The procedure is that of pycocotools (`COCOeval`; Lin et al., "Microsoft COCO", ECCV 2014, and its evaluation page). In
each image and class the detections, in order of decreasing score and up to 100, match the ground truth with the highest
IoU; then all detections of a class, in order of decreasing score, give precision as a function of recall. It is fast
because only pairs with an IoU of 0.5 or more can match: all that follows the IoU is computed for those alone, for all
thresholds, area ranges and images at once. Every other detection is a false positive, and is only counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Intersections = Callable[[Ints, Ints], Floats]

THRESHOLDS: Final[Floats] = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS: Final[Floats] = np.linspace(0.0, 1.0, 101)
# Area ranges in square pixels: all, small, medium, large. Ground truth outside of a range is ignored, and detections
# outside of it are no false positives.
AREAS: Final[Floats] = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])
MAX_DETECTIONS: Final = (1, 10, 100)  # per image and class


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """The boxes, or masks, of many images in one table.

    Attributes:
        image: (N,) index of the image.
        label: (N,) class, from 0.
        corner: (N, 2) x and y of the upper left corner, pixels.
        side: (N, 2) width and height, pixels.
        pixels: (N,) area of each mask; None for boxes.
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
        """Area of each box or mask, (N,), square pixels."""
        return np.asarray(self.side[:, 0] * self.side[:, 1]) if self.pixels is None else self.pixels


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Precision and recall, whose means are the metrics; -1 where a class has no ground truth.

    Attributes:
        precision: (10 thresholds, 101 recalls, classes, 4 area ranges), of up to 100 detections.
        recall: (10 thresholds, classes, 4 area ranges, 3 numbers of detections), the maximum reached.
    """

    precision: Floats
    recall: Floats


def curves(
    truth: Boxes,
    crowd: Bools,
    found: Boxes,
    scores: Floats,
    *,
    classes: int,
    intersections: Intersections | None = None,
) -> Curves:
    """Return precision and recall of detections.

    Args:
        truth: ground truth, in the order of its annotation.
        crowd: (len(truth),) crowd regions, which may match many times and need not be detected.
        found: detections, in any order.
        scores: (len(found),); equal scores keep their order.
        classes: the number of classes.
        intersections: returns the intersections of masks, in pixels, for indices into `found` and `truth`: called with
            pairs of one image and class. None: the boxes' intersections.
    """
    assert not len(found) or (found.label.min() >= 0 and found.label.max() < classes), (
        "a detection's label is out of range"
    )
    order = np.lexsort((-scores, found.image * classes + found.label))
    rank = _position_in_run((found.image * classes + found.label)[order])
    order, rank = order[rank < MAX_DETECTIONS[-1]], rank[rank < MAX_DETECTIONS[-1]]
    found, scores = found[order], scores[order]

    ignored = _outside(truth.area) | crowd

    def _intersections(left: Ints, right: Ints) -> Floats:
        return (
            _box_intersections(found[left], truth[right])
            if intersections is None
            else intersections(order[left], right)
        )

    pairs = _pairs(truth, crowd, found, classes, _intersections)
    candidates, matched, matched_ignored = _match(pairs, crowd, ignored, rank)
    positives = np.stack([np.bincount(truth.label[~out], minlength=classes) for out in ignored])  # (areas, classes)
    tally = _tally(found, scores, rank, candidates, matched, matched_ignored)
    return _accumulate(tally, positives, classes)


def _position_in_run(keys: Ints) -> Ints:
    """Return the position of each key in its run of equal keys, from 0: (N,)."""
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    return np.arange(len(keys)) - np.repeat(starts, np.diff(np.append(starts, len(keys))))


def _outside(area: Floats) -> Bools:
    """Return whether each area is outside of each area range: (4, N)."""
    return (area < AREAS[:, :1]) | (area > AREAS[:, 1:])


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Pairs of a detection and ground truth that may match, sorted by detection, then IoU, then ground truth."""

    found: Ints
    truth: Ints
    iou: Floats


def _pairs(truth: Boxes, crowd: Bools, found: Boxes, classes: int, intersections: Intersections) -> _Pairs:
    """Return all pairs of one image and class whose IoU reaches the lowest threshold; `found` is sorted by both."""
    key = truth.image * classes + truth.label
    by_key = np.argsort(key, kind="stable")
    wanted = found.image * classes + found.label
    first, last = (np.searchsorted(key[by_key], wanted, side=side) for side in ("left", "right"))
    many = last - first
    left = np.repeat(np.arange(len(found)), many)
    within = np.arange(len(left)) - np.repeat(np.cumsum(many) - many, many)
    right = by_key[np.repeat(first, many) + within]
    iou = _ious(found.area[left], truth.area[right], crowd[right], intersections(left, right))
    near = iou >= THRESHOLDS[0]
    left, right, iou = left[near], right[near], iou[near]
    order = np.lexsort((right, iou, left))
    return _Pairs(found=left[order], truth=right[order], iou=iou[order])


def _ious(found: Floats, truth: Floats, crowd: Bools, intersections: Floats) -> Floats:
    """Return the IoU (N,) from areas; for a crowd the union is the detection's own area."""
    union = np.where(crowd, found, found + truth - intersections)
    return np.divide(intersections, union, out=np.zeros_like(intersections), where=union > 0)


def _box_intersections(found: Boxes, truth: Boxes) -> Floats:
    """Return the intersection (N,) of each detected box with the ground truth of the same index, square pixels."""
    low = np.maximum(found.corner, truth.corner)
    high = np.minimum(found.corner + found.side, truth.corner + truth.side)
    sides = np.maximum(high - low, 0)
    return np.asarray(sides[:, 0] * sides[:, 1])


def _match(pairs: _Pairs, crowd: Bools, ignored: Bools, rank: Ints) -> tuple[Ints, Bools, Bools]:
    """Match detections to ground truth, in order of decreasing score.

    Ground truth is available to a detection if the IoU reaches the threshold and no other detection has matched it
    (crowds stay available). Ground truth that counts is preferred to ignored one, then a higher IoU, then a later one.

    Returns:
        candidates: (C,) ascending indices of the detections that are in any pair.
        matched: (4 area ranges, 10 thresholds, C) whether each is matched.
        matched_ignored: likewise, whether its ground truth is ignored.
    """
    candidates, starts = np.unique(pairs.found, return_index=True)
    ends = np.append(starts[1:], len(pairs.found))
    shape = (len(AREAS), len(THRESHOLDS))
    matched, matched_ignored = np.zeros((*shape, len(candidates)), bool), np.zeros((*shape, len(candidates)), bool)
    taken = np.zeros((*shape, ignored.shape[1]), bool)
    areas = np.arange(len(AREAS))[:, None, None]
    # Detections of one image and class depend on each other, others do not: all of one rank are matched together.
    by_rank = np.argsort(rank[candidates], kind="stable")
    for turn in np.split(by_rank, np.flatnonzero(np.diff(rank[candidates][by_rank])) + 1) if len(candidates) else []:
        lengths = ends[turn] - starts[turn]
        heads = np.cumsum(lengths) - lengths
        chosen = np.repeat(starts[turn] - heads, lengths) + np.arange(lengths.sum())
        truth = pairs.truth[chosen]
        free = (pairs.iou[chosen] >= THRESHOLDS[:, None]) & (~taken[:, :, truth] | crowd[truth])
        # A detection's pairs are sorted by IoU: the last available one is best, an ignored one only if all are.
        worth = np.where(free, np.arange(1, len(chosen) + 1) + len(chosen) * ~ignored[:, None, truth], 0)
        best = np.maximum.reduceat(worth, heads, axis=2)
        got = best > 0
        winner = truth[(best - 1) % max(len(chosen), 1)]
        matched[:, :, turn] = got
        matched_ignored[:, :, turn] = got & ignored[areas, winner]
        area, threshold, place = np.nonzero(got)
        taken[area, threshold, winner[area, threshold, place]] = True
    return candidates, matched, matched_ignored


@dataclass(frozen=True, kw_only=True)
class _Tally:
    """True and false positives, with detections in order of class and decreasing score.

    Attributes:
        labels: (C,) classes of the detections that are in any pair.
        rank: (C,) their rank in image and class.
        true: (4 area ranges, 10 thresholds, C) whether each is a true positive.
        false: (4, 10, C) the number of false positives of its class up to each.
    """

    labels: Ints
    rank: Ints
    true: Bools
    false: Ints


def _tally(
    found: Boxes, scores: Floats, rank: Ints, candidates: Ints, matched: Bools, matched_ignored: Bools
) -> _Tally:
    outside = _outside(found.area)  # (areas, detections)
    alone = np.ones(len(found), bool)
    alone[candidates] = False
    order = np.lexsort((-scores, found.label))
    # Detections without a pair are false positives at every threshold, unless they are outside of the area range.
    plain = np.cumsum((~outside & alone)[:, order], axis=1, dtype=np.int64)
    place = np.empty(len(found), np.int64)
    place[order] = np.arange(len(found))

    sorting = np.argsort(place[candidates])
    candidates, matched, matched_ignored = candidates[sorting], matched[:, :, sorting], matched_ignored[:, :, sorting]
    labels = found.label[candidates]
    false = ~matched & ~outside[:, None, candidates]
    total = np.cumsum(false, axis=2, dtype=np.int64) + plain[:, None, place[candidates]]
    # The counts of earlier classes, to be subtracted.
    begin = np.searchsorted(found.label[order], labels, side="left")
    earlier_plain = np.concatenate([np.zeros((len(AREAS), 1), np.int64), plain], axis=1)[:, begin]
    sums = np.concatenate([np.zeros((*false.shape[:2], 1), np.int64), np.cumsum(false, axis=2)], axis=2)
    earlier = sums[:, :, np.searchsorted(labels, labels, side="left")]
    return _Tally(
        labels=labels,
        rank=rank[candidates],
        true=matched & ~matched_ignored,
        false=total - earlier_plain[:, None] - earlier,
    )


def _accumulate(tally: _Tally, positives: Ints, classes: int) -> Curves:
    precision = -np.ones((len(THRESHOLDS), len(RECALLS), classes, len(AREAS)))
    recall = -np.ones((len(THRESHOLDS), classes, len(AREAS), len(MAX_DETECTIONS)))
    bounds = np.searchsorted(tally.labels, np.arange(classes + 1))
    for label, area in zip(*np.nonzero(positives.T), strict=True):
        part, count = slice(bounds[label], bounds[label + 1]), positives[area, label]
        true = tally.true[area, :, part]
        for index, most in enumerate(MAX_DETECTIONS):
            recall[:, label, area, index] = true[:, tally.rank[part] < most].sum(axis=1) / count
        hits = np.cumsum(true, axis=1)
        # pycocotools' own epsilon. False positives after the last of these lower only values that are never read.
        exact = hits / (tally.false[area, :, part] + hits + np.spacing(1))
        envelope = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
        for threshold in range(len(THRESHOLDS)):
            reached = np.searchsorted(hits[threshold] / count, RECALLS, side="left")
            precision[threshold, :, label, area] = np.append(envelope[threshold], 0.0)[reached]
    return Curves(precision=precision, recall=recall)
