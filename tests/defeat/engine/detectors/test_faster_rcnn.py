"""Faster R-CNN laid open: the same numbers as torchvision's plain call."""

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d

from defeat.engine import detectors
from defeat.engine.detectors.pretrained import published
from defeat.engine.report import RunError
from tests.support.training import CLASSES, TINY, images_and_targets


def freeze(module, epsilon=0.0):
    """Replace batch norm by a frozen one, by hand."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=epsilon)
            frozen.load_state_dict(child.state_dict())
            module.add_module(name, frozen)
        else:
            freeze(child, epsilon)
    return module


def build(**changes):
    torch.manual_seed(0)
    return detectors.build({**TINY, **changes}, CLASSES)


@pytest.mark.parametrize("seed", range(5))
def test_losses_and_gradients_are_those_of_the_plain_call(seed):
    detector = build(strides=[4, 8, 16], pool_level=True).train()
    images, targets = images_and_targets(seed=seed)
    results = []
    for call in (lambda: detector(images, targets), lambda: detector.forward_train(images, targets).losses):
        torch.manual_seed(seed)
        # Batch norm's running statistics move with every training pass; the losses do not read them.
        detector.zero_grad()
        losses = call()
        sum(losses.values()).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in detector.named_parameters()}
        results.append((losses, gradients, torch.get_rng_state()))
    (plain, plain_gradients, plain_state), (ours, our_gradients, our_state) = results
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert all(torch.equal(plain_gradients[name], our_gradients[name]) for name in plain_gradients)
    assert torch.equal(plain_state, our_state)  # the same random numbers were drawn


@pytest.mark.parametrize("seed", range(3))
def test_so_they_are_with_batch_norm_in_pyramid_and_head(seed):
    changes = {"pyramid_batch_norm": True, "rpn_convolutions": 2, "box_head": "convolutional"}
    images, targets = images_and_targets(seed=seed)
    results = []
    for call in (lambda one: one(images, targets), lambda one: one.forward_train(images, targets).losses):
        detector = build(**changes).train()
        torch.manual_seed(seed)
        losses = call(detector)
        sum(losses.values()).backward()
        gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
        results.append({**losses, **gradients, **detector.state_dict(prefix="state."), "random": torch.get_rng_state()})
    plain, ours = results
    assert plain.keys() == ours.keys()
    # The running statistics too: the head ran once, on the same proposals.
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_a_pass_shows_what_was_sampled():
    detector = build().train()
    images, targets = images_and_targets()
    passed = detector.forward_train(images, targets)
    assert passed.images.shape[0] == len(images)
    assert [tuple(one.shape[-2:]) for one in passed.features.values()] == [
        (passed.images.shape[-2] // stride, passed.images.shape[-1] // stride) for stride in detector.strides
    ]
    assert [len(one) for one in passed.proposals] == [len(one) for one in passed.labels]
    assert passed.class_logits.shape == (sum(len(one) for one in passed.labels), len(CLASSES) + 1)
    # The logits are the detector's own score of exactly these proposals.
    again = detector.score_proposals(passed.features, passed.proposals, passed.image_sizes)
    torch.testing.assert_close(again, passed.class_logits)


def test_the_pretrained_preset_is_torchvisions_model():
    config = published()["fasterrcnn_resnet50_fpn"].config.model_dump(mode="json")
    ours = detectors.build(config, [str(number) for number in range(90)]).eval()
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the released weights have these names
    # torchvision freezes the batch norm, with this epsilon, when it loads COCO_V1.
    theirs.backbone.body = freeze(theirs.backbone.body)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (96,), 128
        model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        mine, plain = ours([image])[0], theirs([image])[0]
    assert all(torch.equal(mine[key], plain[key]) for key in ("boxes", "labels", "scores"))


def test_the_v2_preset_is_torchvisions_model():
    config = published()["fasterrcnn_resnet50_fpn_v2"].config.model_dump(mode="json")
    ours = detectors.build(config, [str(number) for number in range(90)]).eval()
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (96,), 128
        model.roi_heads.score_thresh = 0.0
        model.rpn._post_nms_top_n["testing"] = 40  # a convolutional head takes its time
    with torch.no_grad():
        mine, plain = ours([image])[0], theirs([image])[0]
    assert len(plain["boxes"]) > 0
    assert all(torch.equal(mine[key], plain[key]) for key in ("boxes", "labels", "scores"))


def test_selecting_classes_keeps_their_logits_and_boxes():
    torch.manual_seed(0)
    detector = detectors.build(TINY, ["a", "b", "c", "d"]).train()
    images, targets = images_and_targets()
    passed = detector.forward_train(images, targets)
    detector.select_classes(["d", "b"])
    logits, boxes = detector._head(passed.features, passed.proposals, passed.image_sizes)
    torch.testing.assert_close(logits, passed.class_logits[:, [0, 4, 2]])
    assert boxes.shape[1] == 3 * 4
    assert detector.classes == ["d", "b"]


def test_frozen_batch_norm_trains_no_statistics():
    for backbone in ("timm/resnet10t", "torchvision/resnet18"):
        detector = build(backbone=backbone, frozen_batch_norm=True).train()
        body = detector.backbone.body
        assert not [name for name, _ in body.named_parameters() if ".bn" in name]
        before = {name: value.clone() for name, value in body.named_buffers()}
        detector.forward_train(*images_and_targets())
        assert all(torch.equal(before[name], value) for name, value in body.named_buffers())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "yolo"}, "known: faster_rcnn"),
        ({"backbone": "timm/nothing"}, "timm/resnet10t"),
        ({"bakbone": "timm/resnet10t"}, "detector.bakbone"),
        ({"strides": [4, 16]}, "consecutive"),
        ({"strides": [4, 6]}, "detector.strides.1"),
        ({"pyramid_channels": 1}, "greater than or equal to 8"),
        ({"min_size": 100, "max_size": 50}, "at most max_size, which is 50"),
    ],
)
def test_a_wrong_spec_names_key_value_and_choices(change, says):
    with pytest.raises(RunError) as caught:
        build(**change)
    assert caught.value.failure_class == "user"
    assert says in caught.value.detail
