"""pycocotools, the reference for every number that says how good a detector is."""

import contextlib
import io
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def coco_evaluation(truth: dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    """Return pycocotools' finished box evaluation: `stats` has the twelve numbers, `eval` the curves."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = truth
        ground.createIndex()
        evaluation = COCOeval(ground, ground.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
