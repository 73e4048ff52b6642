"""What the API works out of a detector's spec by itself is what the engine builds."""

import pytest
import torch

from app.jobs.pairing import strides_of
from worker.detectors import build


@pytest.mark.parametrize(
    "spec",
    [
        {"architecture": "faster_rcnn", "strides": [8, 16]},
        {"architecture": "faster_rcnn", "strides": [8, 16], "pool_level": False},
        {"architecture": "retinanet", "strides": [16, 32]},
        {"architecture": "fcos", "extra_levels": "none"},
    ],
)
def test_strides(spec):
    with torch.device("meta"):
        detector = build({**spec, "backbone": "torchvision/resnet18"}, ["cat"])
    assert strides_of(detector.config.model_dump(mode="json")) == list(detector.strides)
