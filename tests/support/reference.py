"""pycocotools, the reference for every number that says how good a detector is."""

import contextlib
import io
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from defeat.engine.data.canonical import CanonicalDataset, Split
from defeat.engine.evaluation.evaluate import ImageDetections

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


def to_coco(dataset: CanonicalDataset, split: Split) -> dict[str, Any]:
    """Return one split as COCO ground truth for evaluation.

    Image ids are the images' own, category ids the class index + 1, annotation ids count from 1; `bbox` is
    `[x, y, width, height]` in pixels and `area` its product.
    """
    images = dataset.in_split(split)
    annotations = [
        {
            "image_id": image.id,
            "category_id": box.class_index + 1,
            "bbox": [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1],
            "area": (box.x2 - box.x1) * (box.y2 - box.y1),
            "iscrowd": int(box.crowd),
        }
        for image in images
        for box in image.boxes
    ]
    return {
        "info": {"description": f"{split} split"},
        "images": [
            {"id": image.id, "file_name": image.file, "width": image.width, "height": image.height} for image in images
        ],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(dataset.classes, start=1)],
    }


def to_results(found: dict[int, ImageDetections]) -> list[dict[str, Any]]:
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


def coco_evaluation(truth: dict[str, Any], results: list[dict[str, Any]], of: str = "bbox") -> COCOeval:
    """Return pycocotools' finished evaluation (`segm`: of masks): `stats` has the twelve numbers, `eval` the curves."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = truth
        ground.createIndex()
        evaluation = COCOeval(ground, ground.loadRes(results), of)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
