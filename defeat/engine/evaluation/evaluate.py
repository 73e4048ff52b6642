"""COCO's metrics of a detector on one split: of its boxes, and of its masks if detector and dataset have masks."""

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
from defeat.engine.evaluation.coco import MAX_DETECTIONS, Boxes, Curves, Intersections, curves
from defeat.engine.evaluation.mask_intersections import MaskIntersections, mask_intersections, object_areas
from defeat.engine.numerics import numerics

# COCO's names of the area ranges other than `all`.
SIZES = ("small", "medium", "large")
_NO_TARGET = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


class ImageDetections(TypedDict):
    """Detections in one image, see `Detections`, without their masks but with the areas that the metrics need."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    mask_intersections: NotRequired[MaskIntersections]


def detect_split(
    detector: Detector,
    reader: ImageReader,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda _: None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[int, ImageDetections]:
    """Detect in the images of a split; return the detections by image id, on the CPU.

    Masks are evaluated if the detector has them and any object of the split has one.

    Args:
        detector: on the device; ends in eval mode.
        reader: the split.
        batch_size: images per forward pass.
        device: where to detect.
        on_batch: called with the number of images after each batch; may raise to stop.
        rank: this process's number: it detects in every `world_size`-th image.
        world_size: the number of processes that share the split.
    """
    detector.eval()
    with_masks = detector.trains_masks and any(box.mask for image in reader.images for box in image.boxes)
    detect = detector.detect_with_masks if with_masks else detector.detect
    on_gpu = device.type == "cuda"
    found: dict[int, ImageDetections] = {}
    share = range(rank, len(reader), world_size)
    decoded = reader.read_all(share, ahead=2 * batch_size if on_gpu else 0)
    # The exported detector is evaluated: in full float32, whatever the training's precision.
    with numerics(device, "float32"):
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            batch = Batch.of([(image, _NO_TARGET) for image in itertools.islice(decoded, len(indices))])
            detections = detect((batch.pin_memory() if on_gpu else batch).to(device).floats())
            records = [reader.images[index] for index in indices]
            for record, on_device, on_cpu in zip(records, detections, _on_cpu(detections), strict=True):
                found[record.id] = on_cpu
                if with_masks:
                    on_cpu["mask_intersections"] = mask_intersections(on_device, record)
            on_batch(len(indices))
    return found


def _on_cpu(detections: Sequence[Detections]) -> list[ImageDetections]:
    """Return the boxes, labels and scores of a batch on the CPU, by one copy of each kind.

    Each image's tensors own their memory: views would be sent to another process with the memory of the whole batch.
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
    return [ImageDetections(boxes=b, labels=c, scores=s) for b, c, s in zip(boxes, labels, scores, strict=True)]


def coco_metrics(dataset: CanonicalDataset, split: Split, found: Mapping[int, ImageDetections]) -> dict[str, Any]:
    """Return COCO's twelve metrics and per-class AP and AP50 of detections against a split's ground truth.

    Values are 0 to 1; None where there is no ground truth (COCO's -1). If masks were evaluated, `masks` has the same
    metrics of them: there an object without a mask counts as a crowd region, which need not be detected, with its box
    as its mask.
    """
    records, classes = dataset.in_split(split), dataset.classes
    truth, crowd = _truth(records)
    detections, scores = _detections(records, found)
    metrics = _metrics(curves(truth, crowd, detections, scores, classes=len(classes)), classes)
    if any("mask_intersections" in one for one in found.values()):
        areas, intersections = _mask_table(records, found)
        has_mask = np.array([box.mask is not None for record in records for box in record.boxes], bool)
        metrics["masks"] = _metrics(
            curves(
                replace(truth, pixels=object_areas(records)),
                crowd | ~has_mask,
                replace(detections, pixels=areas),
                scores,
                classes=len(classes),
                intersections=intersections,
            ),
            classes,
        )
    return {**metrics, "images": len(found), "detections": len(detections)}


def _metrics(result: Curves, classes: Sequence[str]) -> dict[str, Any]:
    precision, recall = result.precision, result.recall
    return {
        "ap": _mean(precision[..., 0]),
        "ap50": _mean(precision[0, ..., 0]),
        "ap75": _mean(precision[5, ..., 0]),
        **{f"ap_{name}": _mean(precision[..., area]) for area, name in enumerate(SIZES, start=1)},
        **{f"ar_{most}": _mean(recall[:, :, 0, index]) for index, most in enumerate(MAX_DETECTIONS)},
        **{f"ar_{name}": _mean(recall[:, :, area, -1]) for area, name in enumerate(SIZES, start=1)},
        "per_class": [
            {"class": name, "ap": _mean(precision[:, :, index, 0]), "ap50": _mean(precision[0, :, index, 0])}
            for index, name in enumerate(classes)
        ],
    }


def _mask_table(
    records: Sequence[AnnotatedImage], found: Mapping[int, ImageDetections]
) -> tuple[np.ndarray, Intersections]:
    """Return the area of each detection's mask, and the function of their intersections that `curves` calls."""
    areas, tables = [np.zeros(0)], [np.zeros(0)]
    # For each detection, where its row of intersections begins; for each object, its column in its image's rows.
    rows, columns, begin = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for record in records:
        columns.append(np.arange(len(record.boxes)))
        if record.id in found:
            masks = found[record.id]["mask_intersections"]
            areas.append(masks.areas.numpy())
            tables.append(masks.intersections.numpy().ravel())
            rows.append(begin + len(record.boxes) * np.arange(len(masks.areas)))
            begin += masks.intersections.numel()
    table, row, column = np.concatenate(tables), np.concatenate(rows), np.concatenate(columns)
    return np.concatenate(areas), lambda left, right: table[row[left] + column[right]]


def _truth(records: Sequence[AnnotatedImage]) -> tuple[Boxes, np.ndarray]:
    """Return a split's boxes and which of them are crowds."""
    rows = [
        (image, box.class_index, box.x1, box.y1, box.x2, box.y2, box.crowd)
        for image, record in enumerate(records)
        for box in record.boxes
    ]
    table = np.array(rows, np.float64).reshape(-1, 7)
    return _boxes(table[:, 0], table[:, 1], table[:, 2:6]), table[:, 6] > 0


def _detections(records: Sequence[AnnotatedImage], found: Mapping[int, ImageDetections]) -> tuple[Boxes, np.ndarray]:
    """Return all detections of a split and their scores, image by image."""
    present = [(image, found[record.id]) for image, record in enumerate(records) if record.id in found]
    if not present:
        return _boxes(np.zeros(0), np.zeros(0), np.zeros((0, 4))), np.zeros(0)
    boxes = torch.cat([one["boxes"] for _, one in present]).numpy()
    labels = torch.cat([one["labels"] for _, one in present]).numpy()
    scores = torch.cat([one["scores"] for _, one in present]).numpy()
    images = np.repeat([image for image, _ in present], [len(one["scores"]) for _, one in present])
    return _boxes(images, labels - 1, boxes.astype(np.float64)), scores.astype(np.float64)


def _boxes(images: np.ndarray, labels: np.ndarray, corners: np.ndarray) -> Boxes:
    return Boxes(
        image=images.astype(np.int64),
        label=labels.astype(np.int64),
        corner=corners[:, :2],
        side=corners[:, 2:] - corners[:, :2],
    )


def _mean(values: np.ndarray) -> float | None:
    """Return the mean without the -1 of classes without ground truth; None if no value is left."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def summary(metrics: dict[str, Any]) -> str:
    """Return AP and AP50 for a message, as `AP 0.412, AP50 0.701`."""
    shown: Sequence[tuple[str, str]] = (("AP", "ap"), ("AP50", "ap50"))
    return ", ".join(f"{name} {'none' if metrics[key] is None else format(metrics[key], '.3f')}" for name, key in shown)
