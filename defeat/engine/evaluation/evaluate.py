"""COCO's metrics of a detector on one split: of its boxes, and of its masks where there are some on both sides."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from defeat.engine.data.canonical import AnnotatedImage, CanonicalDataset, Split
from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.loader import ImageReader
from defeat.engine.detectors.base import Detections, Detector, Target
from defeat.engine.evaluation.coco import MOST_DETECTIONS, Boxes, Common, Curves, curves
from defeat.engine.evaluation.mask_overlaps import MaskOverlaps, mask_overlaps, object_pixels
from defeat.engine.numerics import numerics

# The ranges of areas apart from `all`, as COCO calls them.
SIZES = ("small", "medium", "large")
_NOTHING = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


class Seen(TypedDict):
    """Detections in one image, see `Detections`, and what their masks share with its objects."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    overlaps: NotRequired[MaskOverlaps]


def detect_split(
    detector: Detector,
    reader: ImageReader,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda _: None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[int, Seen]:
    """Detect in every image of a split; return the detections by image id, on the CPU.

    Masks are looked at where the detector has them and any object of the split is outlined.

    Of `world_size` processes, number `rank` does its share: every `world_size`-th image.

    `on_batch` is called with the number of images after each batch; it may raise to stop.
    """
    detector.eval()
    with_masks = detector.trains_masks and any(box.mask for image in reader.images for box in image.boxes)
    detect = detector.detect_with_masks if with_masks else detector.detect
    on_gpu = device.type == "cuda"
    found: dict[int, Seen] = {}
    mine = range(rank, len(reader), world_size)
    decoded = reader.read_all(mine, ahead=2 * batch_size if on_gpu else 0)
    # What is measured is what will be exported: exact float32, whatever the training computed in.
    with numerics(device, "float32"):
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            batch = Batch.of([(image, _NOTHING) for image in itertools.islice(decoded, len(indices))])
            detections = detect((batch.pin_memory() if on_gpu else batch).to(device).floats())
            shown = [reader.images[index] for index in indices]
            for record, its, seen in zip(shown, detections, _on_cpu(detections), strict=True):
                found[record.id] = seen
                if with_masks:
                    seen["overlaps"] = mask_overlaps(its, record)
            on_batch(len(indices))
    return found


def _on_cpu(detections: Sequence[Detections]) -> list[Seen]:
    """Return the boxes, labels and scores of a batch on the CPU, by one copy of each kind.

    Each image's own memory: a view would take the whole batch's along when it goes to another process.
    """
    counts = [len(one["labels"]) for one in detections]
    boxes, labels, scores = (
        [part.clone() for part in torch.cat(kind).cpu().split(counts)]
        for kind in (
            [one["boxes"] for one in detections],
            [one["labels"] for one in detections],
            [one["scores"] for one in detections],
        )
    )
    return [Seen(boxes=b, labels=c, scores=s) for b, c, s in zip(boxes, labels, scores, strict=True)]


def coco_metrics(dataset: CanonicalDataset, split: Split, found: Mapping[int, Seen]) -> dict[str, Any]:
    """Return COCO's twelve metrics and per-class AP and AP50 of detections against a split's ground truth.

    Values are 0 to 1; None where there is nothing to measure (COCO's -1). Where masks were looked at, `masks` has the
    same of them: an object that the dataset does not outline counts as a crowd there, which need not be found, with its
    box for a mask.
    """
    records, classes = dataset.in_split(split), dataset.classes
    truth, crowd = _truth(records)
    guesses, scores = _guesses(records, found)
    metrics = _numbers(curves(truth, crowd, guesses, scores, classes=len(classes)), classes)
    if any("overlaps" in seen for seen in found.values()):
        pixels, common = _shared(records, found)
        outlined = np.array([box.mask is not None for record in records for box in record.boxes], bool)
        metrics["masks"] = _numbers(
            curves(
                replace(truth, pixels=object_pixels(records)),
                crowd | ~outlined,
                replace(guesses, pixels=pixels),
                scores,
                classes=len(classes),
                common=common,
            ),
            classes,
        )
    return {**metrics, "images": len(found), "detections": len(guesses)}


def _numbers(result: Curves, classes: Sequence[str]) -> dict[str, Any]:
    precision, recall = result.precision, result.recall
    return {
        "ap": _mean(precision[..., 0]),
        "ap50": _mean(precision[0, ..., 0]),
        "ap75": _mean(precision[5, ..., 0]),
        **{f"ap_{name}": _mean(precision[..., area]) for area, name in enumerate(SIZES, start=1)},
        **{f"ar_{most}": _mean(recall[:, :, 0, index]) for index, most in enumerate(MOST_DETECTIONS)},
        **{f"ar_{name}": _mean(recall[:, :, area, -1]) for area, name in enumerate(SIZES, start=1)},
        "per_class": [
            {"class": name, "ap": _mean(precision[:, :, index, 0]), "ap50": _mean(precision[0, :, index, 0])}
            for index, name in enumerate(classes)
        ],
    }


def _shared(records: Sequence[AnnotatedImage], found: Mapping[int, Seen]) -> tuple[np.ndarray, Common]:
    """Return how many pixels each detection's mask has, and what `curves` asks for of pairs of masks."""
    pixels, tables = [np.zeros(0)], [np.zeros(0)]
    # Of each detection, where its row of shared pixels begins; of each object, its place in its image's rows.
    rows, columns, begin = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for record in records:
        columns.append(np.arange(len(record.boxes)))
        if record.id in found:
            overlaps = found[record.id]["overlaps"]
            pixels.append(overlaps.pixels.numpy())
            tables.append(overlaps.common.numpy().ravel())
            rows.append(begin + len(record.boxes) * np.arange(len(overlaps.pixels)))
            begin += overlaps.common.numel()
    table, row, column = np.concatenate(tables), np.concatenate(rows), np.concatenate(columns)
    return np.concatenate(pixels), lambda left, right: table[row[left] + column[right]]


def _truth(records: Sequence[AnnotatedImage]) -> tuple[Boxes, np.ndarray]:
    """Return a split's boxes and which of them are crowds."""
    rows = [
        (image, box.class_index, box.x1, box.y1, box.x2, box.y2, box.crowd)
        for image, record in enumerate(records)
        for box in record.boxes
    ]
    table = np.array(rows, np.float64).reshape(-1, 7)
    return _boxes(table[:, 0], table[:, 1], table[:, 2:6]), table[:, 6] > 0


def _guesses(records: Sequence[AnnotatedImage], found: Mapping[int, Seen]) -> tuple[Boxes, np.ndarray]:
    """Return all detections of a split and their scores, image by image."""
    there = [(image, found[record.id]) for image, record in enumerate(records) if record.id in found]
    if not there:
        return _boxes(np.zeros(0), np.zeros(0), np.zeros((0, 4))), np.zeros(0)
    boxes = torch.cat([seen["boxes"] for _, seen in there]).numpy()
    labels = torch.cat([seen["labels"] for _, seen in there]).numpy()
    scores = torch.cat([seen["scores"] for _, seen in there]).numpy()
    images = np.repeat([image for image, _ in there], [len(detections["scores"]) for _, detections in there])
    return _boxes(images, labels - 1, boxes.astype(np.float64)), scores.astype(np.float64)


def _boxes(images: np.ndarray, labels: np.ndarray, corners: np.ndarray) -> Boxes:
    return Boxes(
        image=images.astype(np.int64),
        label=labels.astype(np.int64),
        corner=corners[:, :2],
        side=corners[:, 2:] - corners[:, :2],
    )


def _mean(values: np.ndarray) -> float | None:
    """Mean over what is there; -1 marks a class without ground truth."""
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def summary(metrics: dict[str, Any]) -> str:
    """Return AP and AP50 for a message, as `AP 0.412, AP50 0.701`."""
    shown: Sequence[tuple[str, str]] = (("AP", "ap"), ("AP50", "ap50"))
    return ", ".join(f"{name} {'none' if metrics[key] is None else format(metrics[key], '.3f')}" for name, key in shown)
