"""Half precision ends at the heads' outputs: boxes of images of hundreds of pixels stay where they are."""

from typing import Any

import pytest
import torch

from defeat.engine import detectors
from tests.support.training import CLASSES, TINY, images_and_targets

SMALL = {"backbone": TINY["backbone"], "strides": [8, 16], "pyramid_channels": 32}
FAMILIES: dict[str, Any] = {
    "faster_rcnn": TINY,
    "retinanet": {
        **SMALL,
        "architecture": "retinanet",
    },
    "retinanet_v2": {**SMALL, "architecture": "retinanet", "box_loss": "giou", "head_norm": "group"},
    "fcos": {**SMALL, "architecture": "fcos"},
    "ssdlite": {"architecture": "ssdlite"},
}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_half_precision_are_those_of_full(family, precision):
    spec = FAMILIES[family]
    torch.manual_seed(0)
    detector = detectors.build(spec if family == "ssdlite" else {**spec, "min_size": 512, "max_size": 700}, CLASSES)
    detector.train()
    found = []
    for one in (torch.float32, precision):
        torch.manual_seed(1)
        with torch.autocast("cpu", one, enabled=one != torch.float32):
            found.append(detector.forward_train(*images_and_targets()))
    full, half = found
    for name, loss in full.losses.items():
        assert half.losses[name].dtype == torch.float32
        assert half.losses[name].item() == pytest.approx(loss.item(), rel=0.03, abs=2e-3), name
    if full.proposals is not None:
        assert all(one.dtype == torch.float32 for one in half.proposals)
    if full.anchors is not None:
        assert all(torch.equal(mine, other) for mine, other in zip(half.anchors, full.anchors, strict=True))
