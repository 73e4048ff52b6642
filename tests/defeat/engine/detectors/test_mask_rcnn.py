"""Mask R-CNN laid open: torchvision's numbers where there are masks, Faster R-CNN's where there are none."""

from pathlib import Path

import pytest
import torch
from torchvision.models import detection

from defeat.engine import detectors
from defeat.engine.detectors.pretrained import load_pretrained, published
from defeat.engine.report import RunError
from tests.defeat.engine.detectors.test_faster_rcnn import freeze
from tests.support.one_stage import backward
from tests.support.training import CLASSES, TINY, images_and_targets

MASK = {**TINY, "architecture": "mask_rcnn", "mask_channels": 8}
PRESETS = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")
BOX_LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def build(classes=CLASSES, **changes):
    torch.manual_seed(0)
    return detectors.build({**MASK, **changes}, classes)


def with_masks(seed=0, indices=(0, 1, 2)):
    """Random images; of these, each object's mask is the lower left half of its box."""
    images, targets = images_and_targets(seed=seed)
    for index in indices:
        height, width = images[index].shape[-2:]
        masks = torch.zeros(len(targets[index]["boxes"]), height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, targets[index]["boxes"].int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = torch.ones(y2 - y1, x2 - x1).tril().byte()
        targets[index]["masks"] = masks
    return images, targets


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mask_batch_norm", [False, True])
def test_losses_and_gradients_are_those_of_the_plain_call(seed, mask_batch_norm):
    detector = build(mask_batch_norm=mask_batch_norm).train()
    images, targets = with_masks(seed)
    plain, plain_gradients, plain_state = backward(detector, lambda: detector(images, targets), seed)
    ours, our_gradients, our_state = backward(detector, lambda: detector.forward_train(images, targets).losses, seed)
    assert plain.keys() == ours.keys() == BOX_LOSSES | {"loss_mask"}
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert all(torch.equal(plain_gradients[name], our_gradients[name]) for name in plain_gradients)
    assert any("mask_head" in name and gradient.norm() > 0 for name, gradient in our_gradients.items())
    assert torch.equal(plain_state, our_state)  # the same random numbers were drawn


def test_without_masks_it_trains_as_the_faster_rcnn_in_it_does():
    images, targets = images_and_targets()
    masked = build().train()
    torch.manual_seed(0)
    plain = detectors.build(TINY, CLASSES).train()
    plain.load_state_dict({name: value for name, value in masked.state_dict().items() if "mask" not in name})
    torch.manual_seed(7)
    ours = masked.forward_train(images, targets)
    torch.manual_seed(7)
    theirs = plain(images, targets)
    assert ours.losses.keys() == theirs.keys() == BOX_LOSSES
    assert all(torch.equal(ours.losses[name], theirs[name]) for name in theirs)
    torch.stack(list(ours.losses.values())).sum().backward()
    without = {name for name, parameter in masked.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in masked.named_parameters() if "mask" in name}


def test_its_detections_are_those_of_a_plain_call_with_and_without_masks():
    detector = build().eval()
    detector.roi_heads.score_thresh = 0.0
    images, _ = with_masks()
    with torch.no_grad():
        plain = detector(images)
    assert sum(len(one["boxes"]) for one in plain) > 0
    for detect in (detector.detect, detector.detect_with_masks):
        for image, found, expected in zip(images, detect(images), plain, strict=True):
            for name in ("boxes", "labels", "scores"):
                assert torch.equal(found[name], expected[name])
            if detect == detector.detect_with_masks:
                size = (image.shape[1], image.shape[2])
                spread = detection.roi_heads.paste_masks_in_image(found["masks"][:, None], found["boxes"], size)
                torch.testing.assert_close(spread, expected["masks"])
            else:
                assert "masks" not in found


def test_images_without_masks_take_no_part_in_the_masks_loss():
    """The loss is that of the images with masks: what the mask head makes of the others changes nothing."""
    detector = build().train()
    images, targets = with_masks(indices=(0, 2))
    torch.manual_seed(3)
    passed = detector.forward_train(images, targets)
    masked = [0, 2]
    positive = [torch.where(labels > 0)[0] for labels in passed.labels]
    heads = detector.roi_heads
    losses, count = [], 0
    for index in masked:
        boxes = passed.proposals[index][positive[index]]
        features = {name: one[index : index + 1] for name, one in passed.features.items()}
        heads.mask_roi_pool.scales = None
        pooled = heads.mask_roi_pool(features, [boxes], [tuple(passed.images.shape[-2:])])
        logits = heads.mask_predictor(heads.mask_head(pooled))
        overlaps = detection.roi_heads.box_ops.box_iou(boxes, passed.targets[index]["boxes"])
        nearest = overlaps.argmax(dim=1)
        labels = passed.targets[index]["labels"][nearest]
        for row, label in enumerate(labels.tolist()):
            truth = detection.roi_heads.project_masks_on_boxes(
                passed.targets[index]["masks"], boxes[row : row + 1], nearest[row : row + 1], 28
            )
            losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits[row, label], truth[0]))
            count += 1
    assert count > 1
    torch.testing.assert_close(passed.losses["loss_mask"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


def test_objects_without_masks_take_no_part_in_the_masks_loss():
    """An empty mask is none: the loss is that of the other objects' proposals, and its box is trained all the same."""
    detector = build().train()
    images, targets = with_masks()
    torch.manual_seed(3)
    whole = detector.forward_train(images, targets)
    targets[2]["masks"][1] = 0
    targets[1]["masks"][:] = 0
    torch.manual_seed(3)
    passed = detector.forward_train(images, targets)
    assert all(torch.equal(passed.losses[name], whole.losses[name]) for name in BOX_LOSSES)
    heads, losses = detector.roi_heads, []
    for index, (labels, proposals) in enumerate(zip(passed.labels, passed.proposals, strict=True)):
        target = passed.targets[index]
        boxes = proposals[labels > 0]
        features = {name: one[index : index + 1] for name, one in passed.features.items()}
        heads.mask_roi_pool.scales = None
        pooled = heads.mask_roi_pool(features, [boxes], [tuple(passed.images.shape[-2:])])
        logits = heads.mask_predictor(heads.mask_head(pooled))
        nearest = detection.roi_heads.box_ops.box_iou(boxes, target["boxes"]).argmax(dim=1)
        for row, match in enumerate(nearest.tolist()):
            if not target["masks"][match].any():
                continue
            truth = detection.roi_heads.project_masks_on_boxes(
                target["masks"], boxes[row : row + 1], nearest[row : row + 1], 28
            )
            label = int(target["labels"][match])
            losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits[row, label], truth[0]))
    assert 1 < len(losses) < sum(int((labels > 0).sum()) for labels in passed.labels)
    torch.testing.assert_close(passed.losses["loss_mask"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("empty", ["masks", "boxes"])
def test_a_batch_without_any_mask_has_a_loss_of_nothing(empty):
    """Every process must have the same parts of the loss, and batch norm no statistics of nothing."""
    detector = build(mask_batch_norm=True).train()
    images, targets = with_masks()
    for target, image in zip(targets, images, strict=True):
        if empty == "boxes":
            target |= {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        target["masks"] = torch.zeros(len(target["boxes"]), *image.shape[-2:], dtype=torch.uint8)
    before = {name: one.clone() for name, one in detector.named_buffers() if "mask" in name}
    losses = detector.forward_train(images, targets).losses
    assert losses["loss_mask"] == 0
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: one.grad for name, one in detector.named_parameters()}
    assert all(gradients[name] is None for name in gradients if "mask" in name)
    assert all(one is None or torch.isfinite(one).all() for one in gradients.values())
    assert len(before) > 0
    assert all(torch.equal(before[name], one) for name, one in detector.named_buffers() if name in before)


def test_detections_are_the_boxes_of_the_plain_call_without_masks():
    detector = build(score_threshold=0.0).eval()
    images, _ = images_and_targets()
    found = detector.detect(images)
    with torch.no_grad():
        plain = detector(images)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.keys() == {"boxes", "labels", "scores"}
        assert len(ours["boxes"]) > 0
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_selecting_classes_keeps_logits_boxes_and_masks():
    detector = build(["a", "b", "c", "d"]).eval()
    features = torch.rand(2, 8, 14, 14)
    pooled = torch.rand(2, 32)
    heads = detector.roi_heads
    before, logits = heads.mask_predictor(features), heads.box_predictor(pooled)[0]
    detector.select_classes(["d", "b"])
    torch.testing.assert_close(heads.mask_predictor(features), before[:, [0, 4, 2]])
    torch.testing.assert_close(heads.box_predictor(pooled)[0], logits[:, [0, 4, 2]])
    detector.train().forward_train(*with_masks())


def test_a_saved_detector_comes_back_the_same(tmp_path):
    detector = build(score_threshold=0.0).eval()
    detectors.save(detector, tmp_path / "d.safetensors")
    again = detectors.load(tmp_path / "d.safetensors")
    state = detector.state_dict()
    assert {name for name in state if "mask" in name}
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    images, _ = images_and_targets()
    for one, other in zip(detector.detect(images), again.detect(images), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))


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
    assert (len(ours.classes), ours.classes[0], ours.head_kind) == (90, "person", "two_stage")
    if not name.endswith("v2"):
        theirs.backbone.body = freeze(theirs.backbone.body)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (96,), 128
        model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 5
        model.rpn._post_nms_top_n["testing"] = 20  # a convolutional head takes its time
    with torch.no_grad():
        mine, plain = ours([image])[0], theirs([image])[0]
    assert len(plain["boxes"]) == 5
    assert all(torch.equal(mine[key], plain[key]) for key in ("boxes", "labels", "scores", "masks"))


def test_a_wrong_spec_names_key_and_value():
    for change, says in (({"mask_channels": 4}, "detector.mask_channels"), ({"strides": [4, 16]}, "consecutive")):
        with pytest.raises(RunError) as caught:
            build(**change)
        assert says in caught.value.detail


def test_shared_batch_norm_leaves_out_the_mask_head_which_a_process_may_not_reach():
    detector = build(mask_batch_norm=True)
    before = detector.state_dict().keys()
    detector.synchronise_batch_norm()
    shared = {name for name, one in detector.named_modules() if isinstance(one, torch.nn.SyncBatchNorm)}
    own = {name for name, one in detector.named_modules() if isinstance(one, torch.nn.BatchNorm2d)}
    assert shared
    assert all(name.startswith("backbone.") for name in shared)
    assert len(own) == 4
    assert all(name.startswith("roi_heads.mask_head.") for name in own)
    assert detector.state_dict().keys() == before
