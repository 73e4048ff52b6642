"""Frozen stages: exactly what lies before a stride, and it stays as it was to the last byte."""

import copy

import pytest
import torch

from defeat.engine import detectors
from defeat.engine.detectors.backbones import STRIDES
from defeat.engine.report import RunError
from tests.defeat.engine.detectors.test_backbones import MAKES, pyramid_of
from tests.support.ssd import SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

MORE_MAKES = (
    "timm/darknet53",
    "timm/edgenext_xx_small",
    "timm/ghostnet_100",
    "timm/hgnetv2_b0",
    "timm/mnasnet_small",
    "timm/mobilenetv4_conv_small",
    "timm/regnety_002",
    "timm/resnet10t",
)


def frozen_names(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("name", [*MAKES, *MORE_MAKES])
def test_a_stage_is_all_that_its_last_map_hangs_on(name):
    """Autograd says which parameters a stride's map is made of: these must be frozen, and no others."""
    with torch.device("meta"):
        pyramid = pyramid_of(name).eval()
        maps = list(pyramid.body(torch.zeros(1, 3, 64, 64)).values())
    parameters = {key: p for key, p in pyramid.named_parameters() if not key.startswith("body.norms.")}
    made_of = []
    for features in maps:
        gradients = torch.autograd.grad(features.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        made_of.append({key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None})
    assert frozen_names(pyramid) == set()
    for stage, expected in enumerate(made_of, 1):
        pyramid.freeze(stage)
        assert frozen_names(pyramid) == expected


@pytest.mark.parametrize("strides", [(8, 16), (4, 8), (32,)])
@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "torchvision/swin_t", "timm/lcnet_050"])
def test_stages_count_strides_not_levels(name, strides):
    with torch.device("meta"):
        whole, part = pyramid_of(name), pyramid_of(name, strides=strides)
    for stages in range(len(STRIDES) + 1):
        whole.freeze(stages)
        part.freeze(stages)
        assert frozen_names(part) == frozen_names(whole) & {key for key, _ in part.named_parameters()}


def test_there_are_four_stages():
    pyramid = pyramid_of("torchvision/resnet18")
    for stages in (-1, 5):
        with pytest.raises(ValueError, match="0 to 4"):
            pyramid.freeze(stages)


@pytest.mark.parametrize("backbone", ["torchvision/mobilenet_v3_small", "timm/mobilenetv3_small_050"])
def test_training_leaves_frozen_stages_as_they_are(backbone):
    """Parameters and the statistics of batch norm, byte for byte; everything behind them is trained."""
    torch.manual_seed(0)
    detector = detectors.build({**TINY, "backbone": backbone}, CLASSES)
    detector.freeze_stages(2)
    frozen = {f"backbone.{key}" for key in frozen_names(detector.backbone)}
    prefixes = {key.rsplit(".", 1)[0] for key in frozen}
    before = copy.deepcopy(detector.state_dict())
    optimiser = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        detector.train()
        optimiser.zero_grad()
        images, targets = images_and_targets(seed=step)
        sum(detector.forward_train(images, targets).losses.values()).backward()
        optimiser.step()
    for key, tensor in detector.state_dict().items():
        if key.rsplit(".", 1)[0] in prefixes:
            assert tensor.equal(before[key]), key
        elif key.startswith("backbone."):
            assert not tensor.equal(before[key]), key
    assert len(frozen) > 10


def test_frozen_stages_stay_in_eval_mode():
    detector = detectors.build({**TINY, "backbone": "torchvision/efficientnet_b0"}, CLASSES)
    detector.freeze_stages(1)
    detector.eval().train()
    body = detector.backbone.body
    modes = {name: {module.training for module in child.modules()} for name, child in body.named_children()}
    assert modes == {"0": {False}, "1": {False}, "2": {False}, "3": {True}, "4": {True}, "5": {True}}
    detector.freeze_stages(0)
    assert not body.get_submodule("2").training


def test_batch_norm_that_is_synchronised_later_is_frozen_too():
    pyramid = pyramid_of("torchvision/resnet18")
    pyramid.freeze(1)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(pyramid)
    pyramid.train()
    assert isinstance(pyramid.body.get_submodule("bn1"), torch.nn.SyncBatchNorm)
    modes = {name: child.training for name, child in pyramid.body.named_children()}
    assert [name for name, training in modes.items() if training] == ["layer2", "layer3", "layer4"]


def test_a_detector_without_stages_says_so():
    bare = detectors.build(SSDLITE, CLASSES)
    bare.freeze_stages(0)
    with pytest.raises(RunError) as caught:
        bare.freeze_stages(1)
    assert (caught.value.failure_class, caught.value.code) == ("user", "stages_cannot_freeze")
    assert "ssdlite has no stages that could be frozen: leave it at 0" in caught.value.detail
