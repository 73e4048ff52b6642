"""Which trainable parameters a training pass gives a gradient: all, whatever the images, or the family says so."""

from typing import Any

import pytest
import torch

from defeat.engine import detectors
from tests.support.one_stage import FCOS, RETINANET
from tests.support.ssd import SSD, SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

MOBILENET = {"architecture": "faster_rcnn_mobilenet", "pyramid_channels": 16, "min_size": 64, "max_size": 96}
SPECS: dict[str, dict[str, Any]] = {
    "faster_rcnn": TINY,
    "faster_rcnn v2": {
        **TINY,
        "pool_level": True,
        "pyramid_batch_norm": True,
        "rpn_convolutions": 2,
        "box_head": "convolutional",
    },
    "faster_rcnn_mobilenet": MOBILENET,
    "retinanet": RETINANET,
    "retinanet v2": {**RETINANET, "extra_levels": "p6p7_backbone", "head_norm": "group", "box_loss": "giou"},
    "fcos": {**FCOS, "extra_levels": "p6p7"},
    "ssd": SSD,
    "ssdlite": SSDLITE,
}
MASK = {**TINY, "architecture": "mask_rcnn", "mask_channels": 8}
EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}


def without_gradient(spec: dict[str, Any], boxes: str, *, masks: bool = False) -> list[str]:
    """Return the names of the trainable parameters that one training pass gives no gradient."""
    torch.manual_seed(0)
    detector = detectors.build(spec, CLASSES).train()
    if hasattr(detector.backbone, "freeze"):
        detector.freeze_stages(1)
    images, targets = images_and_targets(2)
    if masks:
        pairs = zip(images, targets, strict=True)
        targets = [
            {**one, "masks": torch.ones(len(one["boxes"]), *image.shape[1:], dtype=torch.uint8)} for image, one in pairs
        ]
    given = {"all": targets, "some": [targets[0], EMPTY], "none": [EMPTY, EMPTY]}[boxes]
    if masks:
        given = [
            {"masks": torch.zeros(0, *image.shape[1:], dtype=torch.uint8), **one}
            for image, one in zip(images, given, strict=True)
        ]
    losses = detector.forward_train(images, given).losses
    sum(losses.values()).backward()
    return [name for name, one in detector.named_parameters() if one.requires_grad and one.grad is None]


@pytest.mark.parametrize("boxes", ["all", "some", "none"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.usefixtures("narrow_vgg")
def test_every_trainable_parameter_gets_a_gradient(name, boxes):
    family = type(detectors.build(SPECS[name], CLASSES))
    assert not family.leaves_parameters_out
    assert without_gradient(SPECS[name], boxes) == []


@pytest.mark.parametrize(
    ("boxes", "masks", "left_out"), [("all", True, False), ("all", False, True), ("none", True, True)]
)
def test_a_mask_rcnn_leaves_its_mask_head_out(boxes, masks, left_out):
    assert type(detectors.build(MASK, CLASSES)).leaves_parameters_out
    idle = without_gradient(MASK, boxes, masks=masks)
    assert all(name.startswith("roi_heads.mask_") for name in idle)
    assert bool(idle) == left_out


def test_every_family_is_tested():
    assert {spec["architecture"] for spec in (*SPECS.values(), MASK)} == detectors.DETECTORS.keys()
