"""The gallery: a few images of the evaluation split with the boxes of ground truth, teacher and student."""

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from defeat.engine.data.canonical import AnnotatedImage
from defeat.engine.data.loading.batch import to_float
from defeat.engine.data.loading.loader import ImageReader
from defeat.engine.detectors.base import Detections, Detector
from defeat.engine.report import Reporter

# Boxes with a lower score would hide the image; the slider of the dashboard's page begins here.
MIN_SCORE = 0.2


def write_gallery(
    reporter: Reporter,
    reader: ImageReader,
    detectors: Mapping[str, Detector | None],
    *,
    classes: Sequence[str],
    count: int,
    device: torch.device,
) -> None:
    """Write `gallery.json` and copies of up to `count` images, spread evenly over the split, as artifacts.

    `detectors` maps `teacher` and `student` to detectors in eval mode; None has no boxes.
    """
    count = min(count, len(reader))
    if not count:
        return
    shown = []
    for number in range(count):
        index = number * len(reader) // count
        record = reader.images[index]
        source = reader.root / record.file
        name = f"gallery/{number}{source.suffix}"
        content_type = "image/png" if source.suffix == ".png" else "image/jpeg"
        shutil.copyfile(source, reporter.artifact(name, kind="gallery", content_type=content_type))
        image = to_float(reader.read(index), device)
        entry: dict[str, Any] = {
            "file": name,
            "name": record.name,
            "width": record.width,
            "height": record.height,
            "truth": _truth(record),
        }
        for subject, detector in detectors.items():
            entry[subject] = [] if detector is None else _boxes(detector.detect([image])[0])
        shown.append(entry)
    path = reporter.artifact("gallery.json", kind="gallery", content_type="application/json")
    path.write_text(json.dumps({"classes": list(classes), "images": shown}))


def _truth(record: AnnotatedImage) -> list[dict[str, Any]]:
    return [{"class": box.class_index, "box": [box.x1, box.y1, box.x2, box.y2]} for box in record.boxes]


def _boxes(detections: Detections) -> list[dict[str, Any]]:
    return [
        {"class": label - 1, "box": [round(value, 1) for value in box], "score": round(score, 4)}
        for box, label, score in zip(
            detections["boxes"].tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True
        )
        if score >= MIN_SCORE
    ]
