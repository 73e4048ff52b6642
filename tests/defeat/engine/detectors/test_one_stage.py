"""One-stage detectors laid open: the same numbers as torchvision's plain call, and labels that count from 1."""

import re
from pathlib import Path

import pytest
import torch
from torchvision.models import detection

from defeat.engine import detectors
from defeat.engine.detectors.pretrained import load_pretrained, published
from defeat.engine.report import RunError
from tests.defeat.engine.detectors.test_faster_rcnn import freeze
from tests.support.one_stage import FAMILIES, backward, build, with_an_empty_image, without_column_zero
from tests.support.training import CLASSES, images_and_targets

OWN_LOSSES = {
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
    "retinanet": {"classification", "bbox_regression"},
}
# Each preset, with the epsilon of frozen batch norm that torchvision gives its weights; None where it is not frozen.
PRESETS = {"fcos_resnet50_fpn": 1e-5, "retinanet_resnet50_fpn": 0.0, "retinanet_resnet50_fpn_v2": None}
V2_HEAD = {"head_norm": "group", "box_loss": "giou", "extra_levels": "p6p7_backbone", "pyramid_channels": 48}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_are_those_of_the_plain_call(family, seed):
    detector = build(family, extra_levels="p6p7").train()
    images, targets = with_an_empty_image(seed)
    plain, plain_gradients, plain_state = backward(detector, lambda: detector(images, targets), seed)
    ours, our_gradients, our_state = backward(detector, lambda: detector.forward_train(images, targets).losses, seed)
    assert plain.keys() == ours.keys() == OWN_LOSSES[family]
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert all(torch.equal(plain_gradients[name], our_gradients[name]) for name in plain_gradients)
    assert torch.equal(plain_state, our_state)  # the same random numbers were drawn


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_shows_the_pyramid_and_no_proposals(family):
    detector = build(family, extra_levels="p6p7").train()
    passed = detector.forward_train(*images_and_targets())
    assert detector.strides == (8, 16, 32, 64)
    assert detector.head_kind == detectors.DETECTORS[family].head == "one_stage"
    assert [tuple(one.shape[-2:]) for one in passed.features.values()] == [
        (-(-passed.images.shape[-2] // stride), -(-passed.images.shape[-1] // stride)) for stride in detector.strides
    ]
    with torch.no_grad():
        again = detector.eval().features(passed.images)
    assert [one.shape for one in again.values()] == [one.shape for one in passed.features.values()]
    assert passed.proposals is passed.labels is passed.class_logits is None
    with pytest.raises(NotImplementedError):
        detector.score_proposals(passed.features, [], passed.image_sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_the_pretrained_preset_is_torchvisions_model(name):
    config = published()[name].config.model_dump(mode="json")
    ours = detectors.build(config, [str(number) for number in range(90)]).eval()
    torch.manual_seed(0)
    theirs = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=91).eval()
    theirs.load_state_dict(without_column_zero(theirs.state_dict(), 91))
    frozen = PRESETS[name] is not None
    assert ours.state_dict().keys() == {key for key in theirs.state_dict() if not (frozen and "num_batches" in key)}
    ours.load_state_dict(theirs.state_dict())  # strict: the released weights have these names
    if frozen:
        theirs.backbone.body = freeze(theirs.backbone.body, epsilon=PRESETS[name])
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (96,), 128
        model.score_thresh = 1e-3
    with torch.no_grad():
        mine, plain = ours([image])[0], theirs([image])[0]
    assert len(plain["boxes"]) == ours.detections_per_img
    assert all(torch.equal(mine[key], plain[key]) for key in ("boxes", "labels", "scores"))
    for untouched in ("nms_thresh", "detections_per_img", "topk_candidates"):
        assert getattr(ours, untouched) == getattr(theirs, untouched)


@pytest.mark.parametrize("name", PRESETS)
def test_published_weights_load_with_their_classes(name, monkeypatch, tmp_path):
    """A file made here stands for the download, with the old names of the head that real ones have (v2's has not)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=91).state_dict()
    path = tmp_path / "hub" / "checkpoints" / Path(published()[name].weights["COCO_V1"].url).name
    path.parent.mkdir(parents=True)
    old = list(theirs)
    if not name.endswith("v2"):
        old = [re.sub(r"head\.conv\.(\d)\.0\.", lambda found: f"head.conv.{2 * int(found[1])}.", key) for key in theirs]
    torch.save(dict(zip(old, theirs.values(), strict=True)), path)
    detector = load_pretrained(name, "COCO_V1")
    ours = detector.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(detector.classes) == 90
    assert (detector.classes[0], detector.classes[-1]) == ("person", "toothbrush")
    detector.select_classes(["dog", "person"])
    weight = detector.head.classification_head.cls_logits.weight
    anchors = detector.anchor_generator.num_anchors_per_location()[0]
    expected = theirs["head.classification_head.cls_logits.weight"].view(anchors, 91, 256, 3, 3)[:, [0, 18, 1]]
    assert torch.equal(weight, expected.flatten(0, 1))  # 18 and 1 are COCO's ids of dog and person


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_are_torchvisions(name):
    with torch.device("meta"):
        theirs = detection.__dict__[name](weights=None, weights_backbone=None)
        ours = detectors.build(published()[name].config.model_dump(mode="json"), CLASSES)
    for attribute in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert (ours.transform.min_size, ours.transform.max_size) == (theirs.transform.min_size, theirs.transform.max_size)
    assert ours.anchor_generator.sizes == theirs.anchor_generator.sizes
    assert ours.anchor_generator.aspect_ratios == theirs.anchor_generator.aspect_ratios
    if "retinanet" in name:
        assert ours.head.regression_head._loss_type == theirs.head.regression_head._loss_type


def test_the_v2_head_trains_as_in_the_plain_call():
    detector = build("retinanet", **V2_HEAD).train()
    # 32 groups do not divide 48 channels; 16 do.
    groups = [one.num_groups for one in detector.head.modules() if isinstance(one, torch.nn.GroupNorm)]
    assert groups == [16] * 8
    images, targets = with_an_empty_image(0)
    plain, plain_gradients, _ = backward(detector, lambda: detector(images, targets), 0)
    ours, our_gradients, _ = backward(detector, lambda: detector.forward_train(images, targets).losses, 0)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert all(torch.equal(plain_gradients[name], our_gradients[name]) for name in plain_gradients)
    detector.head.regression_head._loss_type = "l1"
    other = detector.forward_train(images, targets).losses
    assert not torch.equal(other["bbox_regression"], ours["bbox_regression"])


@pytest.mark.parametrize("family", FAMILIES)
def test_column_zero_is_never_detected_and_takes_no_place(family):
    """Even where its weights say otherwise: detections are those of a detector whose column 0 scores nothing."""
    detector = build(family, score_threshold=0.001, candidates=50).eval()
    columns = len(CLASSES) + 1
    silent = without_column_zero(detector.state_dict(), columns)
    loud = {name: tensor.clone() for name, tensor in silent.items()}
    loud["head.classification_head.cls_logits.bias"][::columns] = 20.0
    images, _ = images_and_targets()
    found = []
    for state in (silent, loud):
        detector.load_state_dict(state)
        found.append(detector.detect(images))
    for quiet, other in zip(*found, strict=True):
        assert all(torch.equal(quiet[key], other[key]) for key in ("boxes", "labels", "scores"))
        assert len(other["labels"]) > 0
        assert set(other["labels"].tolist()) <= {1, 2}
        assert other["scores"].tolist() == sorted(other["scores"].tolist(), reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_selecting_classes_keeps_their_scores_and_boxes(family):
    detector = build(family, ("a", "b", "c", "d")).eval()
    images, targets = images_and_targets()
    levels = list(detector.features(torch.rand(2, 3, 64, 96)).values())
    before = detector.head(levels)
    detector.select_classes(["d", "b"])
    after = detector.head(levels)
    torch.testing.assert_close(after.pop("cls_logits"), before.pop("cls_logits")[..., [0, 4, 2]])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert detector.classes == ["d", "b"]
    detector.score_thresh = 0.001
    assert {label for found in detector.detect(images) for label in found["labels"].tolist()} == {1, 2}
    detector.train().forward_train(images, targets)  # and it can be trained on


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_detector_comes_back_the_same(family, tmp_path):
    detector = build(family, extra_levels="p6p7", score_threshold=0.001).eval()
    detectors.save(detector, tmp_path / "d.safetensors")
    again = detectors.load(tmp_path / "d.safetensors")
    assert (again.config, again.classes, again.strides) == (detector.config, list(CLASSES), detector.strides)
    images, _ = images_and_targets()
    for one, other in zip(detector.detect(images), again.detect(images), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("retinanet", {"extra_levels": "p6"}, "detector.extra_levels"),
        ("retinanet", {"pool_level": True}, "detector.pool_level"),
        ("retinanet", {"strides": [4, 16]}, "consecutive"),
        ("fcos", {"pyramid_channels": 48}, "multiple of 32"),
        ("fcos", {"anchor_ratios": [1.0]}, "detector.anchor_ratios"),
        ("fcos", {"strides": [8, 32]}, "consecutive"),
        ("retinanet", {"anchor_octaves": 0}, "greater than or equal to 1"),
        ("retinanet", {"min_size": 100, "max_size": 50}, "at most max_size, which is 50"),
    ],
)
def test_a_wrong_spec_names_key_and_value(family, change, says):
    with pytest.raises(RunError) as caught:
        build(family, **change)
    assert caught.value.failure_class == "user"
    assert says in caught.value.detail
