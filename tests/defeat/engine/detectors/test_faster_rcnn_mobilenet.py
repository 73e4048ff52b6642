"""torchvision's Faster R-CNN on MobileNetV3: two levels of one stride, and anchors that are the same on all."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from defeat.engine import detectors, methods
from defeat.engine.detectors.pretrained import load_pretrained, published
from defeat.engine.report import RunError
from tests.defeat.engine.detectors.test_faster_rcnn import freeze
from tests.support.one_stage import backward
from tests.support.training import CLASSES, TINY, images_and_targets

SMALL = {
    "architecture": "faster_rcnn_mobilenet",
    "pyramid_channels": 16,
    "min_size": 64,
    "max_size": 96,
    "head_channels": 32,
    "train_proposals": 64,
    "test_proposals": 32,
    "box_samples": 32,
    "proposal_threshold": 0.0,
}
PRESETS = ("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn")


def build(**changes):
    torch.manual_seed(0)
    return detectors.build({**SMALL, **changes}, CLASSES)


@pytest.mark.parametrize("changes", [{}, {"pool_level": False, "pyramid_batch_norm": True}])
def test_losses_and_gradients_are_those_of_the_plain_call(changes):
    # Two passes of the same detector: dropout and the like are none, and batch norm's statistics are not read.
    detector = build(**changes).train()
    images, targets = images_and_targets()
    plain, plain_gradients, plain_state = backward(detector, lambda: detector(images, targets), 0)
    ours, our_gradients, our_state = backward(detector, lambda: detector.forward_train(images, targets).losses, 0)
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert all(torch.equal(plain_gradients[name], our_gradients[name]) for name in plain_gradients)
    assert torch.equal(plain_state, our_state)


@pytest.mark.parametrize(("pool_level", "strides"), [(True, (32, 32, 64)), (False, (32, 32))])
def test_its_maps_have_the_strides_it_says(pool_level, strides):
    detector = build(pool_level=pool_level).eval()
    assert (detector.strides, detector.channels) == (strides, (16,) * len(strides))
    with torch.no_grad():
        maps = detector.features(torch.zeros(1, 3, 96, 160)).values()
    assert [tuple(one.shape) for one in maps] == [(1, 16, -(-96 // one), -(-160 // one)) for one in strides]


@pytest.mark.parametrize("name", PRESETS)
def test_the_pretrained_preset_is_torchvisions_model(name, monkeypatch, tmp_path):
    """Its weights come from torch's cache, where a file made here stands for the download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    theirs = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=91).eval()
    path = tmp_path / "hub" / "checkpoints" / Path(published()[name].weights["COCO_V1"].url).name
    path.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), path)
    ours = load_pretrained(name, "COCO_V1").eval()
    assert (len(ours.classes), ours.classes[0]) == (90, "person")
    # torchvision freezes the batch norm when it loads COCO_V1, and leaves the frozen one's epsilon alone.
    theirs.backbone.body = freeze(theirs.backbone.body, epsilon=1e-5)
    assert any(isinstance(one, FrozenBatchNorm2d) and one.eps == 1e-5 for one in ours.backbone.body.modules())
    for attribute in ("min_size", "max_size", "fixed_size", "size_divisible", "image_mean", "image_std"):
        assert getattr(ours.transform, attribute) == getattr(theirs.transform, attribute)
    for attribute in ("score_thresh", "nms_thresh", "_pre_nms_top_n", "_post_nms_top_n"):
        assert getattr(ours.rpn, attribute) == getattr(theirs.rpn, attribute)
    for attribute in ("sizes", "aspect_ratios"):
        assert getattr(ours.rpn.anchor_generator, attribute) == getattr(theirs.rpn.anchor_generator, attribute)
    for attribute in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(ours.roi_heads, attribute) == getattr(theirs.roi_heads, attribute)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (96,), 128
        model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        mine, plain = ours([image])[0], theirs([image])[0]
    assert len(plain["boxes"]) > 0
    assert all(torch.equal(mine[key], plain[key]) for key in ("boxes", "labels", "scores"))


def test_its_two_levels_of_one_stride_pair_with_one_of_another_pyramid():
    torch.manual_seed(0)
    student, teacher = detectors.build({**TINY, "strides": [16, 32]}, CLASSES).train(), build().eval()
    method = methods.build({"method": "defeat"}, student, teacher)
    assert (method.pairs, method.strides) == ([(1, 0)], [32])
    same = methods.build({"method": "fitnet"}, build().train(), teacher)
    assert (same.pairs, same.strides) == ([(0, 0), (1, 1), (2, 2)], [32, 32, 64])
    passed = student.forward_train(*images_and_targets())
    losses = method(passed, teacher.requires_grad_(False), methods.StepInfo(step=0, steps=1, epoch=0, epochs=1))
    assert all(loss.isfinite() for loss in losses.values())


def test_a_saved_detector_comes_back_the_same(tmp_path):
    detector = build(score_threshold=0.0, frozen_batch_norm=True, batch_norm_epsilon=0.01).eval()
    detectors.save(detector, tmp_path / "d.safetensors")
    again = detectors.load(tmp_path / "d.safetensors")
    assert {one.eps for one in again.modules() if isinstance(one, FrozenBatchNorm2d)} == {0.01}
    images, _ = images_and_targets()
    for one, other in zip(detector.detect(images), again.detect(images), strict=True):
        assert len(one["boxes"]) > 0
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))


def test_imagenet_weights_that_cannot_be_had_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def _no_network(*_args, **_kwargs):
        raise URLError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    with pytest.raises(RunError) as caught:
        detectors.build(SMALL, CLASSES, pretrained_backbone=True)
    assert (caught.value.failure_class, caught.value.code) == ("infra", "weights_unavailable")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strides": [16, 32]}, "strides are what the family has, [32, 32]; got [16, 32]"),
        ({"backbone": "torchvision/resnet50"}, "detector.backbone"),
        ({"anchor_doublings": 0}, "detector.anchor_doublings"),
        ({"proposal_threshold": 1.0}, "less than 1"),
        ({"min_size": 100, "max_size": 50}, "at most max_size, which is 50"),
    ],
)
def test_a_wrong_spec_names_key_and_value(change, says):
    with pytest.raises(RunError) as caught:
        build(**change)
    assert caught.value.failure_class == "user"
    assert says in caught.value.detail
