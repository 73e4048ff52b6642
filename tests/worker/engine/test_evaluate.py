"""Our metrics against pycocotools, the reference."""

import numpy as np
import pytest
import torch

from tests.reference import coco_evaluation
from worker.data.canonical import Box, CanonicalDataset, Picture, to_coco
from worker.engine.evaluate import STATS, coco_metrics, to_results


def random_case(seed, pictures=30, classes=3):
    """A dataset with boxes of all sizes and crowds, and detections near them, with ties in score and false ones."""
    rng = np.random.default_rng(seed)
    images, found = [], {}
    for number in range(1, pictures + 1):
        boxes, guesses = [], []
        for _ in range(int(rng.integers(0, 6))):
            x, y = rng.uniform(0, 400, 2)
            w, h = rng.uniform(5, 220, 2)
            kind = int(rng.integers(classes - 1))  # the last class has no ground truth
            boxes.append(Box(kind, x, y, x + w, y + h, crowd=bool(rng.random() < 0.1)))
            for _ in range(int(rng.integers(0, 3))):
                dx, dy, dw, dh = rng.normal(0, 0.08, 4) * (w, h, w, h)
                guesses.append([x + dx, y + dy, x + w + dw, y + h + dh, int(rng.integers(classes)) + 1])
        for _ in range(int(rng.integers(0, 4))):
            x, y = rng.uniform(0, 400, 2)
            guesses.append([x, y, x + 30, y + 40, int(rng.integers(classes)) + 1])
        scores = np.round(rng.random(len(guesses)), 2).astype(np.float32)
        table = torch.tensor(guesses, dtype=torch.float32).reshape(-1, 5)
        found[number] = {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": torch.from_numpy(scores)}
        images.append(Picture(number, f"images/{number:064x}.png", str(number), 640, 640, "val", tuple(boxes)))
    return CanonicalDataset(tuple("abcdef"[:classes]), tuple(images)), found


@pytest.mark.parametrize("seed", range(5))
def test_all_numbers_equal_pycocotools(seed):
    dataset, found = random_case(seed)
    ours = coco_metrics(dataset, "val", found)
    theirs = coco_evaluation(to_coco(dataset, "val"), to_results(found))
    for name, value in zip(STATS, theirs.stats, strict=True):
        assert (ours[name] if ours[name] is not None else -1) == pytest.approx(value, abs=1e-9), name
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for index, entry in enumerate(ours["per_class"]):
        there = precision[:, :, index]
        expected = there[there > -1].mean() if (there > -1).any() else None
        assert entry["ap"] == (pytest.approx(expected, abs=1e-9) if expected is not None else None)
    assert ours["per_class"][-1]["ap"] is None  # no ground truth: nothing to measure, not 0
    assert ours["images"] == 30


def test_no_detections_is_zero_and_no_error():
    dataset, found = random_case(0)
    empty = {
        number: {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        for number in found
    }
    metrics = coco_metrics(dataset, "val", empty)
    assert metrics["ap"] == 0.0
    assert metrics["detections"] == 0
