"""COCO's box metrics of a detector on one split (faster-coco-eval; equal to pycocotools', held by a test)."""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from worker.data.canonical import CanonicalDataset, Split, to_coco
from worker.data.loader import PictureReader
from worker.detectors.base import Detections, Detector

# COCO's twelve numbers, in the order of COCOeval's `stats`.
STATS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar_1",
    "ar_10",
    "ar_100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


def detect_split(
    detector: Detector,
    pictures: PictureReader,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda _: None,
    rank: int = 0,
    world: int = 1,
) -> dict[int, Detections]:
    """Detect in every picture of a split; return the detections by picture id, on the CPU.

    Of `world` processes, number `rank` does its share: every `world`-th picture.

    `on_batch` is called with the number of pictures after each batch; it may raise to stop.
    """
    detector.eval()
    found: dict[int, Detections] = {}
    mine = range(rank, len(pictures), world)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        images = [to_float(pictures.read(index), device) for index in indices]
        for index, detections in zip(indices, detector.detect(images), strict=True):
            found[pictures.images[index].id] = Detections(
                boxes=detections["boxes"].cpu(), labels=detections["labels"].cpu(), scores=detections["scores"].cpu()
            )
        on_batch(len(indices))
    return found


def to_float(image: Tensor, device: torch.device) -> Tensor:
    """(3, H, W) uint8 -> float 0 to 1 on the device: bytes are a quarter of what would cross the bus otherwise."""
    return image.to(device, non_blocking=True).float().div_(255)


def to_results(found: dict[int, Detections]) -> list[dict[str, Any]]:
    """Return detections as COCO's result list: boxes as x, y, width, height; categories from 1."""
    results = []
    for image_id, detections in found.items():
        boxes = detections["boxes"].double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        for box, label, score in zip(
            boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True
        ):
            results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return results


def coco_metrics(dataset: CanonicalDataset, split: Split, found: dict[int, Detections]) -> dict[str, Any]:
    """Return COCO's twelve metrics and per-class AP and AP50 of detections against a split's ground truth.

    Values are 0 to 1; None where there is nothing to measure (COCO's -1).
    """
    results = to_results(found)
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its table
        truth = COCO(to_coco(dataset, split))
        evaluation = COCOeval_faster(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (IoU thresholds, recalls, classes, areas, most detections): the last area is `all` = 0, the last count 100.
    precision: np.ndarray = evaluation.eval["precision"][:, :, :, 0, -1]
    return {
        **{name: _number(value) for name, value in zip(STATS, evaluation.stats[: len(STATS)], strict=True)},
        "per_class": [
            {"class": name, "ap": _mean(precision[:, :, index]), "ap50": _mean(precision[0, :, index])}
            for index, name in enumerate(dataset.classes)
        ],
        "images": len(found),
        "detections": len(results),
    }


def _number(value: float) -> float | None:
    return None if value < 0 or math.isnan(value) else float(value)


def _mean(precision: np.ndarray) -> float | None:
    """Mean over what is there; -1 marks a class without ground truth."""
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None


def summary(metrics: dict[str, Any]) -> str:
    """Return AP and AP50 for a message, as `AP 0.412, AP50 0.701`."""
    shown: Sequence[tuple[str, str]] = (("AP", "ap"), ("AP50", "ap50"))
    return ", ".join(f"{name} {'none' if metrics[key] is None else format(metrics[key], '.3f')}" for name, key in shown)
