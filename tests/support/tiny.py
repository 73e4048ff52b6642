"""A detector that trains some ten steps a second on one core."""

from typing import Any

TINY: dict[str, Any] = {
    "architecture": "faster_rcnn",
    "backbone": "timm/mobilenetv3_small_050",
    "strides": [8, 16],
    "pool_level": False,
    "pyramid_channels": 16,
    "anchor_scale": 3,
    "min_size": 64,
    "max_size": 96,
    "head_channels": 32,
    "train_proposals": 64,
    "test_proposals": 32,
    "box_samples": 32,
}
