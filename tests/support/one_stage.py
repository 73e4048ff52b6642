"""What the tests of one-stage families share."""

from collections.abc import Callable
from typing import Any

import torch

from defeat.engine import detectors
from defeat.engine.detectors.base import Detector
from tests.support.training import CLASSES, images_and_targets

RETINANET: dict[str, Any] = {
    "architecture": "retinanet",
    "backbone": "timm/mobilenetv3_small_050",
    "strides": [8, 16],
    "extra_levels": "none",
    "pyramid_channels": 16,
    "anchor_scale": 3,
    "anchor_octaves": 2,
    "min_size": 64,
    "max_size": 96,
}
FCOS: dict[str, Any] = {
    "architecture": "fcos",
    "backbone": "timm/mobilenetv3_small_050",
    "strides": [8, 16],
    "extra_levels": "none",
    "pyramid_channels": 32,
    "min_size": 64,
    "max_size": 96,
}
FAMILIES = {"fcos": FCOS, "retinanet": RETINANET}


def build(family: str, classes: tuple[str, ...] = CLASSES, **changes: Any) -> Detector:
    """Return a small detector of a one-stage family, the same at each call."""
    torch.manual_seed(0)
    return detectors.build({**FAMILIES[family], **changes}, classes)


def with_an_empty_image(seed: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return random images with their targets, the last without a box."""
    images, targets = images_and_targets(seed=seed)
    targets[-1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    return images, targets


def without_column_zero(state: dict[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """Return a state whose column 0 scores nothing, as in weights that were trained on labels from 1."""
    logits = "head.classification_head.cls_logits"
    weight, bias = state[f"{logits}.weight"].clone(), state[f"{logits}.bias"].clone()
    weight[::columns], bias[::columns] = 0.0, -20.0
    return {**state, f"{logits}.weight": weight, f"{logits}.bias": bias}


def backward(detector: Detector, losses: Callable[[], dict[str, torch.Tensor]], seed: int) -> tuple[Any, Any, Any]:
    """Return losses, gradients and the state of the random numbers after one training pass."""
    torch.manual_seed(seed)
    detector.zero_grad()
    values = losses()
    torch.stack(list(values.values())).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in detector.named_parameters()}
    return values, gradients, torch.get_rng_state()
