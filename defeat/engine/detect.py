"""Detect with a downloaded student: `python -m defeat.engine.detect STUDENT.safetensors IMAGE [--output IMAGE]`.

Prints one JSON object: the classes, boxes in the image's pixels, and scores.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torchvision.io import write_png
from torchvision.utils import draw_bounding_boxes

from defeat.engine import detectors
from defeat.engine.data.loading.batch import to_float
from defeat.engine.data.loading.loader import read_image
from defeat.engine.report import RunError

MIN_DRAWN_SIZE = 640  # pixels of the longer side below which an image is enlarged before boxes are drawn


def detect(weights: Path, image: Path, *, output: Path | None, min_score: float) -> list[dict[str, Any]]:
    """Return the detections in an image as `{"class", "box": [x1, y1, x2, y2], "score"}`, best first.

    Args:
        weights: a detector's file, as an artifact or a checkpoint is downloaded.
        image: an image file.
        output: where to save the image as PNG with its boxes drawn, enlarged if it is small; None: nowhere.
        min_score: minimum score of a detection, 0 to 1.

    Raises:
        RunError: see `detectors.load`.
    """
    detector = detectors.load(weights)
    pixels = read_image(image)
    found = detector.detect([to_float(pixels, torch.device("cpu"))])[0]
    keep = found["scores"] >= min_score
    names = [detector.classes[label - 1] for label in found["labels"][keep].tolist()]
    boxes, scores = found["boxes"][keep], found["scores"][keep].tolist()
    if output is not None:
        # Small images are enlarged, so that boxes leave room for their labels.
        factor = max(1, MIN_DRAWN_SIZE // max(pixels.shape[-2:]))
        pixels = pixels.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        labels = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
        if len(boxes):
            pixels = draw_bounding_boxes(
                pixels, boxes * factor, labels, colors="#ffb000", label_colors="#ffb000", width=1
            )
        write_png(pixels, str(output))
    return [
        {"class": name, "box": [round(value, 2) for value in box], "score": round(score, 4)}
        for name, box, score in zip(names, boxes.tolist(), scores, strict=True)
    ]


def main() -> None:
    """Read the command line, detect, print."""
    parser = argparse.ArgumentParser(prog="python -m defeat.engine.detect", description=__doc__)
    parser.add_argument("weights", type=Path, help="a detector, as downloaded")
    parser.add_argument("image", type=Path)
    parser.add_argument("--output", type=Path, help="save the image with its boxes here, as PNG")
    parser.add_argument("--score", type=float, default=0.5, help="minimum score, 0 to 1 (default 0.5)")
    arguments = parser.parse_args()
    try:
        found = detect(arguments.weights, arguments.image, output=arguments.output, min_score=arguments.score)
    except (RunError, OSError) as error:
        sys.exit(f"{error}")
    print(json.dumps({"image": str(arguments.image), "detections": found}))


if __name__ == "__main__":
    main()
