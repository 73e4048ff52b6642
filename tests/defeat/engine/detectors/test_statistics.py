"""Frozen statistics: the backbone's batch norm normalises as in eval mode, and its weight and bias are trained."""

import copy
from typing import Any

import pytest
import torch

from defeat.engine import detectors
from tests.support.one_stage import FCOS, RETINANET
from tests.support.ssd import SSD, SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

MOBILENET = {"architecture": "faster_rcnn_mobilenet", "pyramid_channels": 16, "min_size": 64, "max_size": 96}
MASK = {**TINY, "architecture": "mask_rcnn", "mask_channels": 8}
NORMS = torch.nn.modules.batchnorm._BatchNorm
# Those whose backbone has batch norm; two have some of their own besides.
TRAINED: dict[str, Any] = {
    "faster_rcnn": {**TINY, "pyramid_batch_norm": True},
    "torchvision": {**TINY, "backbone": "torchvision/mobilenet_v3_small"},
    "faster_rcnn_mobilenet": {**MOBILENET, "pyramid_batch_norm": True},
    "mask_rcnn": MASK,
    "retinanet": RETINANET,
    "fcos": FCOS,
    "ssdlite": SSDLITE,
}
WITHOUT: dict[str, Any] = {
    "ssd": SSD,
    "frozen": {**TINY, "frozen_batch_norm": True},
    "convnext": {**TINY, "backbone": "timm/convnext_atto"},
}


def build(spec: dict[str, Any]) -> detectors.Detector:
    torch.manual_seed(0)
    return detectors.build(spec, CLASSES).train()


def inside(name: str, detector: detectors.Detector) -> bool:
    return name.startswith("backbone.features." if hasattr(detector.backbone, "extra") else "backbone.body.")


def take_a_step(detector: detectors.Detector, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    torch.manual_seed(0)
    sum(detector.forward_train(*images_and_targets()).losses.values()).backward()
    optimiser.step()


@pytest.mark.parametrize("family", TRAINED)
def test_statistics_stay_and_the_affine_part_is_trained(family):
    detector = build(TRAINED[family])
    detector.freeze_statistics()
    before = copy.deepcopy(detector.state_dict())
    optimiser = torch.optim.SGD(detector.parameters(), lr=0.01)
    for _ in range(2):
        detector.eval().train()
        take_a_step(detector, optimiser)
    norms = {name: one for name, one in detector.named_modules() if isinstance(one, NORMS)}
    backbones = {name for name in norms if inside(name, detector)}
    assert len(backbones) > 10
    assert (len(backbones) < len(norms)) == (family in ("faster_rcnn", "faster_rcnn_mobilenet", "ssdlite"))
    after = detector.state_dict()
    for name, norm in norms.items():
        assert norm.training == (name not in backbones)
        for part in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(after[f"{name}.{part}"], before[f"{name}.{part}"]) == (name in backbones), name
    moved = [not torch.equal(after[f"{name}.bias"], before[f"{name}.bias"]) for name in backbones]
    assert all(moved)


@pytest.mark.parametrize("family", TRAINED)
def test_the_backbone_computes_as_in_eval_mode(family):
    detector = build(TRAINED[family])
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    detector.freeze_statistics()
    with torch.no_grad():
        trained = detector.body(images)
        evaluated = detector.eval().body(images)
    for mine, other in zip(_tensors(trained), _tensors(evaluated), strict=True):
        assert torch.equal(mine, other)


def _tensors(maps: Any) -> list[torch.Tensor]:
    return [maps] if isinstance(maps, torch.Tensor) else list(maps.values())


@pytest.mark.parametrize("family", WITHOUT)
@pytest.mark.usefixtures("narrow_vgg")
def test_where_the_backbone_has_none_nothing_changes(family):
    plain, detector = build(WITHOUT[family]), build(WITHOUT[family])
    detector.freeze_statistics()
    for one in (plain, detector):
        take_a_step(one, torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01))
    assert [one.training for one in detector.modules()] == [one.training for one in plain.modules()]
    assert all(map(torch.equal, detector.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("order", ["stages", "statistics", "synchronised"])
def test_stages_and_synchronised_batch_norm_go_with_it(order):
    detector = build({**TRAINED["torchvision"], "strides": [4, 8, 16, 32], "pyramid_batch_norm": True})
    if order == "stages":
        detector.freeze_stages(2)
    if order == "synchronised":
        detector.synchronise_batch_norm()
    detector.freeze_statistics()
    if order == "statistics":
        detector.freeze_stages(2)
        detector.synchronise_batch_norm()
    else:
        assert not any(one.training for one in detector.body.modules() if isinstance(one, NORMS))
    detector.train()
    norms = [one for one in detector.body.modules() if isinstance(one, NORMS)]
    assert len(norms) > 20
    assert not any(one.training for one in norms)
    trained = [one.weight.requires_grad for one in norms]
    assert trained == sorted(trained)  # those of fixed stages come first
    assert all(trained) == (order == "synchronised")
    assert any(trained)
    assert {type(one) for one in norms} == {torch.nn.BatchNorm2d if order == "stages" else torch.nn.SyncBatchNorm}
    assert all(one.training for one in detector.backbone.fpn.modules())


def test_a_copy_keeps_its_statistics_too():
    detector = build(TINY)
    detector.freeze_statistics()
    other = copy.deepcopy(detector).eval().train()
    assert not any(one.training for one in other.body.modules() if isinstance(one, NORMS))
    assert any(one.training for one in other.body.modules())
