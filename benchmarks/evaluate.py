"""Evaluation, from a detector's output to COCO's metrics: the engine against pycocotools.

    python -m benchmarks.evaluate [--quick]

5,000 images (1,000 with --quick) of 80 classes, with about 7 boxes and 100 detections each, generated from a seed. Both
start from the dataset and from a detector's output, tensors by image, and must compute the same metrics. The two run in
turn.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from defeat.engine.data.canonical import AnnotatedImage, Box, CanonicalDataset
from defeat.engine.evaluation.evaluate import ImageDetections, coco_metrics
from tests.support.reference import STATS, coco_evaluation, to_coco, to_results

GOAL = 8.0
CLASSES, BOXES, DETECTIONS = 80, 7, 100
HEIGHT, WIDTH = 480, 640
TOLERANCE = 1e-9


def scene(rng: np.random.Generator, number: int) -> tuple[AnnotatedImage, ImageDetections]:
    """Return one image with its ground truth, and detections: several near each box, of any class, and random ones."""
    count = int(rng.poisson(BOXES))
    corner = rng.uniform((0, 0), (WIDTH - 40, HEIGHT - 40), (count, 2))
    side = np.minimum(np.exp(rng.uniform(np.log(10), np.log(300), (count, 2))), (WIDTH, HEIGHT) - corner)
    boxes = np.concatenate([corner, corner + side], axis=1)
    classes = rng.integers(CLASSES, size=count)
    image = AnnotatedImage(
        id=number,
        file=f"images/{number:064x}.jpg",
        name=f"{number}.jpg",
        width=WIDTH,
        height=HEIGHT,
        split="val",
        boxes=tuple(
            Box(int(kind), float(box[0]), float(box[1]), float(box[2]), float(box[3]), crowd=bool(rng.random() < 0.01))
            for kind, box in zip(classes, boxes, strict=True)
        ),
    )
    near = np.repeat(np.arange(count), 6)[:DETECTIONS]
    guesses = boxes[near] + rng.normal(0, 0.08, (len(near), 4)) * np.tile(side[near], 2)
    false = rng.uniform((0, 0), (WIDTH - 100, HEIGHT - 100), (DETECTIONS - len(near), 2))
    guesses = np.concatenate([guesses, np.concatenate([false, false + rng.uniform(8, 100, false.shape)], axis=1)])
    labels = np.where(rng.random(len(near)) < 0.8, classes[near], rng.integers(CLASSES, size=len(near)))
    labels = np.concatenate([labels, rng.integers(CLASSES, size=len(false))]) + 1
    scores = np.sort(rng.beta(1, 3, DETECTIONS))[::-1].copy()
    found = ImageDetections(
        boxes=torch.from_numpy(guesses).float(),
        labels=torch.from_numpy(labels).long(),
        scores=torch.from_numpy(scores).float(),
    )
    return image, found


def case(images: int, seed: int = 0) -> tuple[CanonicalDataset, dict[int, ImageDetections]]:
    """Return a dataset of one split, `val`, and detections by image id."""
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, number) for number in range(1, images + 1)]
    dataset = CanonicalDataset(tuple(f"class {index}" for index in range(CLASSES)), tuple(one for one, _ in scenes))
    return dataset, {image.id: found for image, found in scenes}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    parser = argparse.ArgumentParser(description="Evaluation against pycocotools.")
    parser.add_argument("--quick", action="store_true", help="1,000 images and one turn instead of 5,000 and three")
    quick = parser.parse_args(arguments).quick
    images, turns = (1000, 1) if quick else (5000, 3)
    dataset, found = case(images)
    ours_s, theirs_s = [], []
    for turn in range(turns):
        start = time.perf_counter()
        ours = coco_metrics(dataset, "val", found)
        middle = time.perf_counter()
        theirs = coco_evaluation(to_coco(dataset, "val"), to_results(found))
        end = time.perf_counter()
        ours_s.append(middle - start)
        theirs_s.append(end - middle)
        print(f"turn {turn + 1}: ours {ours_s[-1]:.2f} s, pycocotools {theirs_s[-1]:.2f} s", flush=True)
    difference = float(max(abs((ours[name] or 0.0) - value) for name, value in zip(STATS, theirs.stats, strict=True)))
    ratio = statistics.median(theirs_s) / statistics.median(ours_s)
    result = {
        "benchmark": "evaluate",
        "ratio": round(ratio, 2),
        "goal": GOAL,
        "ok": bool(ratio >= GOAL and difference <= TOLERANCE),
        "images": images,
        "detections": ours["detections"],
        "ours_s": round(statistics.median(ours_s), 3),
        "pycocotools_s": round(statistics.median(theirs_s), 3),
        "largest_difference": difference,
        "ap": ours["ap"],
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
