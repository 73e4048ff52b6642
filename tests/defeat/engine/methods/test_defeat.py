"""DeFeat as a method: its parts' values, which proposals it scores, with whose labels, and what it leaves alone."""

import dataclasses
import math

import pytest
import torch
from torchvision.ops import box_iou

from defeat.engine import detectors, methods
from defeat.engine.methods import StepInfo
from defeat.engine.methods.masks import BACKGROUND, OBJECT
from defeat.engine.report import RunError
from tests.defeat.engine.methods.test_losses import restated_feature_loss, restated_logit_loss
from tests.defeat.engine.methods.test_masks import restated, restated_inside, restated_kinds
from tests.support.methods import START, assert_same_loss, one_pass, pair
from tests.support.ssd import SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

HEAD_ONLY = {"method": "defeat", "neck_object_weight": 0, "neck_background_weight": 0}
HEADLESS = {"head_object_weight": 0, "head_background_weight": 0}
TEMPERATURES = {"head_object_temperature": 2.0, "head_background_temperature": 3.0}


def drawn_by(teacher, passed):
    """The proposals that the teacher samples, and their labels."""
    return teacher.sample_proposals(teacher.features(passed.images), passed.images, passed.image_sizes, passed.targets)


@pytest.mark.parametrize("proposals", ["student", "teacher", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_the_students_own_losses_are_those_of_the_plain_call(proposals, seed):
    student, teacher = pair()
    method = methods.build({"method": "defeat", "proposals": proposals}, student, teacher)
    torch.manual_seed(seed)
    plain = student(*images_and_targets(seed=seed))
    passed = one_pass(student, seed)
    before = {name: loss.clone() for name, loss in passed.losses.items()}
    method(passed, teacher, START)
    assert plain.keys() == passed.losses.keys()
    assert all(torch.equal(plain[name], passed.losses[name]) for name in plain)
    assert all(torch.equal(before[name], passed.losses[name]) for name in plain)


def restated_head(student, teacher, passed, proposals, labels):
    """Both heads on one set of proposals, and the weighted losses by loops in float64."""
    with torch.no_grad():
        ours = student.score_proposals(passed.features, proposals, passed.image_sizes).double()
        theirs = teacher.score_proposals(teacher.features(passed.images), proposals, passed.image_sizes).double()
    objects, background = restated_logit_loss(ours, theirs, torch.cat(labels), 2.0, 3.0)
    return 2 * objects, 2 * background


@pytest.mark.parametrize("proposals", ["student", "teacher", "both"])
def test_the_head_scores_these_proposals_with_their_own_labels(proposals):
    student, teacher = pair()
    method = methods.build({**HEAD_ONLY, **TEMPERATURES, "proposals": proposals}, student, teacher)
    passed = one_pass(student)
    state = torch.get_rng_state()
    losses = method(passed, teacher, START)
    torch.set_rng_state(state)
    samples = {"student": [(passed.proposals, passed.labels)], "teacher": [], "both": []}[proposals]
    if proposals != "student":
        drawn = teacher.sample_proposals(
            teacher.features(passed.images), passed.images, passed.image_sizes, passed.targets
        )
        samples = [drawn] if proposals == "teacher" else [(passed.proposals, passed.labels), drawn]
    expected = [restated_head(student, teacher, passed, *sample) for sample in samples]
    assert losses["head_object"].item() == pytest.approx(sum(part[0].item() for part in expected), rel=1e-5)
    assert losses["head_background"].item() == pytest.approx(sum(part[1].item() for part in expected), rel=1e-5)


def test_gradients_flow_through_the_students_head_on_the_teachers_proposals():
    student, teacher = pair()
    method = methods.build({**HEAD_ONLY, **TEMPERATURES, "proposals": "teacher"}, student, teacher)
    passed = one_pass(student)
    state = torch.get_rng_state()
    sum(method(passed, teacher, START).values()).backward()
    ours = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    # The same by hand, in float64: the sampled proposals through a copy of the student's head.
    torch.set_rng_state(state)
    proposals, labels = teacher.sample_proposals(
        teacher.features(passed.images), passed.images, passed.image_sizes, passed.targets
    )
    heads = student.roi_heads
    with torch.no_grad():
        pooled = heads.box_roi_pool(passed.features, proposals, passed.image_sizes).double()
        theirs = teacher.score_proposals(teacher.features(passed.images), proposals, passed.image_sizes).double()
    student.zero_grad()
    student.double()
    logits = heads.box_predictor(heads.box_head(pooled))[0]
    objects, background = restated_logit_loss(logits, theirs, torch.cat(labels), 2.0, 3.0)
    (2 * objects + 2 * background).backward()
    for name in ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_head.fc6.weight"):
        plain = student.get_parameter(name).grad
        assert ((ours[name] - plain).norm() / plain.norm()).item() < 1e-5
    # The proposals are the teacher's: nothing of the student's proposal network is in this loss.
    assert not any(name.startswith("rpn") for name in ours)
    assert any(name.startswith("backbone") for name in ours)


def test_the_teachers_samples_hold_the_ground_truth_and_their_own_labels():
    student, teacher = pair()
    passed = one_pass(student)
    proposals, labels = teacher.sample_proposals(
        teacher.features(passed.images), passed.images, passed.image_sizes, passed.targets
    )
    assert len(proposals) == len(labels) == len(passed.image_sizes)
    for boxes, classes, target in zip(proposals, labels, passed.targets, strict=True):
        overlap = box_iou(target["boxes"], boxes)  # (ground truth, proposals)
        assert (overlap.max(dim=1).values > 0.999).all()
        best, match = overlap.max(dim=0)
        expected = torch.where(best >= 0.5, target["labels"][match], torch.zeros_like(match))
        assert torch.equal(classes, expected)
        assert len(boxes) <= teacher.config.box_samples


@pytest.mark.parametrize("box_head", ["linear", "convolutional"])
def test_sampling_and_scoring_leave_no_trace_in_either_detector(box_head):
    student, teacher = pair(box_head=box_head)
    method = methods.build({"method": "defeat", "proposals": "both"}, student, teacher)
    passed = one_pass(student)
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in (student, teacher)]
    sum(method(passed, teacher, START).values()).backward()
    for state, one in zip(before, (student, teacher), strict=True):
        assert all(torch.equal(state[name], value) for name, value in one.state_dict().items())
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_other_proposals_are_scored_by_their_own_statistics_without_moving_the_running_ones():
    student, teacher = pair(box_head="convolutional")
    passed = one_pass(student)
    proposals, _ = teacher.sample_proposals(
        teacher.features(passed.images), passed.images, passed.image_sizes, passed.targets
    )
    kept = {name: value.clone() for name, value in student.named_buffers()}
    parameters = list(student.roi_heads.box_head.parameters())
    found, gradients = [], []
    for score in (passed.score_proposals, lambda others: student._head(passed.features, others, passed.image_sizes)[0]):
        found.append(score(proposals))
        gradients.append(torch.autograd.grad(found[-1].square().sum(), parameters, retain_graph=True))
        same = [torch.equal(kept[name], value) for name, value in student.named_buffers()]
        assert all(same) == (score is passed.score_proposals)
    assert torch.equal(*found)
    assert all(torch.equal(mine, plain) for mine, plain in zip(*gradients, strict=True))
    # And the next training pass goes on counting.
    (norm,) = [one for name, one in student.named_modules() if name == "roi_heads.box_head.0.1"]
    counted = norm.num_batches_tracked.item()
    one_pass(student)
    assert norm.num_batches_tracked.item() == counted + 1


def test_warmup_and_decay_scale_every_loss():
    student, teacher = pair()
    plain = methods.build({"method": "defeat"}, student, teacher)
    scaled = methods.build({"method": "defeat", "warmup_steps": 8, "decay": "linear"}, student, teacher)
    scaled.load_state_dict(plain.state_dict())
    passed, step_info = one_pass(student), StepInfo(step=3, steps=12, epoch=1, epochs=4)
    full, part = plain(passed, teacher, step_info), scaled(passed, teacher, step_info)
    assert full.keys() == {"neck_object", "neck_background", "head_object", "head_background"}
    for name, loss in full.items():
        assert part[name].item() == pytest.approx(loss.item() * (4 / 8) * (3 / 4), rel=1e-6)


def wide(maps):
    """Maps in float64, as leaves of their own."""
    return {name: one.detach().double().requires_grad_() for name, one in maps.items()}


def restated_convolution(features, weight, bias):
    """A 3x3 convolution of (B, C, H, W), padded with zeros: the sum of its nine taps."""
    height, width = features.shape[-2:]
    padded = features.new_zeros(*features.shape[:2], height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = features
    result = bias[:, None, None]
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            result = result + (weight[:, :, row, column] @ shifted.flatten(2)).unflatten(2, (height, width))
    return result


@pytest.mark.parametrize(
    ("teacher_strides", "given", "object_weight", "background_weight", "base"),
    [
        pytest.param([8, 16, 32], {"mask_base_size": 6.0}, 4, 16, 6.0, id="default-weights"),
        pytest.param([8, 16, 32], {"mask_base_size": 6.0, "mask": "cover"}, 4, 16, 6.0, id="cover"),
        pytest.param([16, 32], {"neck_object_weight": 3, "mask_base_size": 9.0}, 3, 16, 9.0, id="two-levels"),
        pytest.param([8, 16, 32], {"neck_background_weight": 5}, 4, 5, 56.0, id="default-sizes"),
    ],
)
def test_the_neck_part_is_the_formula(teacher_strides, given, object_weight, background_weight, base):
    student = detectors.build({**TINY, "pyramid_channels": 8, "strides": [8, 16, 32]}, CLASSES).train()
    teacher = detectors.build({**TINY, "strides": teacher_strides}, CLASSES).eval().requires_grad_(False)
    method = methods.build({"method": "defeat", **HEADLESS, **given}, student, teacher).double()
    with torch.no_grad():  # as they start, the adapters' part in the differences would not show
        for adapter in method.adapters:
            adapter.weight.normal_(std=0.3)
    passed = one_pass(student, 3)
    passed = dataclasses.replace(passed, features=wide(passed.features))
    strides = [stride for stride in (8, 16, 32) if stride in teacher_strides]
    ours = [passed.features[str((8, 16, 32).index(stride))] for stride in strides]
    theirs = [teacher.features(passed.images)[str(teacher_strides.index(stride))].double() for stride in strides]
    adapted = [
        restated_convolution(one, adapter.weight, adapter.bias)
        for one, adapter in zip(ours, method.adapters, strict=True)
    ]
    height, width = passed.images.shape[-2:]
    sizes = [(height // stride, width // stride) for stride in strides]
    masks = restated([target["boxes"] for target in passed.targets], sizes, strides, given.get("mask", "paper"), base)
    assert [bool(mask.any()) for mask in masks] == [base < 56 or level == 0 for level in range(len(masks))]
    inside = restated_inside(passed.image_sizes, sizes, strides)
    assert not all(cells.all() for cells in inside)
    objects, background = restated_feature_loss(adapted, theirs, restated_kinds(masks, inside))
    losses = method(passed, teacher, START)
    assert losses.keys() == {"neck_object", "neck_background"}
    inputs = [*(one for one, mask in zip(ours, masks, strict=True) if mask.any()), method.adapters[0].weight]
    assert_same_loss(losses["neck_object"], object_weight * objects, inputs)
    assert_same_loss(losses["neck_background"], background_weight * background, [*ours, *method.adapters.parameters()])


def test_adapters_are_3x3_convolutions_that_start_near_zero():
    student, teacher = pair()
    torch.manual_seed(4)
    method = methods.build({"method": "defeat"}, student, teacher)
    torch.manual_seed(4)
    assert len(method.adapters) == 2
    for adapter in method.adapters:
        plain = torch.nn.Conv2d(8, 16, kernel_size=3, padding=1)
        drawn = plain.weight.detach().normal_().flatten().tolist()
        assert max(map(abs, drawn)) > 2  # so that what lies outside is seen to be wrapped, not cut off
        expected = torch.tensor([1e-4 * math.fmod(value, 2) for value in drawn]).view(16, 8, 3, 3)
        torch.testing.assert_close(adapter.weight.detach(), expected, rtol=1e-6, atol=0)
        assert torch.equal(adapter.bias, plain.bias)  # the framework's own
        assert (adapter.padding, adapter.stride) == ((1, 1), (1, 1))


BACKBONE_ONLY = {
    "method": "defeat",
    **dict.fromkeys([f"{part}_{kind}_weight" for part in ("neck", "head") for kind in ("object", "background")], 0),
    "backbone_object_weight": 3.0,
    "backbone_background_weight": 5.0,
}


def restated_backbone_masks(boxes, height, width, sizes):
    """Every box on one map at stride 4, truncated; then each level takes the cell that lies at its own cell's place."""
    finest = torch.zeros(len(boxes), -(-height // 4), -(-width // 4), dtype=torch.bool)
    for image, of_image in enumerate(boxes):
        for x1, y1, x2, y2 in of_image.tolist():
            left, top, right, bottom = (int(value / 4) for value in (x1, y1, x2, y2))
            if right <= left or bottom <= top:
                right, bottom = left + 1, top + 1
            finest[image, top:bottom, left:right] = True
    masks = []
    for rows, columns in sizes:
        mask = torch.zeros(len(boxes), 1, rows, columns, dtype=torch.bool)
        for y in range(rows):
            for x in range(columns):
                mask[:, 0, y, x] = finest[:, y * finest.shape[1] // rows, x * finest.shape[2] // columns]
        masks.append(mask)
    return masks


def test_the_backbone_part_is_the_necks_loss_on_c3_to_c5_with_every_box_on_each():
    torch.manual_seed(0)
    detector = {**TINY, "strides": [4, 8, 16, 32]}
    student = detectors.build({**detector, "pyramid_channels": 8}, CLASSES).train()
    teacher = detectors.build({**detector, "backbone": "timm/resnet10t"}, CLASSES).eval().requires_grad_(False)
    method = methods.build(BACKBONE_ONLY, student, teacher)
    with torch.no_grad():  # as they start, differences between the students' maps would not show
        for adapter in method.backbone_adapters:
            adapter[0].weight.normal_(std=0.1)
    passed = one_pass(student)
    losses = method(passed, teacher, START)
    assert losses.keys() == {"backbone_object", "backbone_background"}
    assert method.backbone_strides == [8, 16, 32]
    assert list(passed.backbone) == [4, 8, 16, 32]
    theirs = teacher.backbone.body(passed.images)
    adapted = []
    for (convolution, _), stride in zip(method.backbone_adapters, (8, 16, 32), strict=True):
        assert convolution.weight.shape[2:] == (3, 3)
        adapted.append(convolution(passed.backbone[stride]).clamp(min=0).detach().double())
    boxes, sizes = [target["boxes"] for target in passed.targets], [tuple(one.shape[-2:]) for one in adapted]
    masks = restated_backbone_masks(boxes, *passed.images.shape[-2:], sizes)
    others = [one.double() for one in list(theirs.values())[1:]]
    kinds = restated_kinds(masks, restated_inside(passed.image_sizes, sizes, (8, 16, 32)))
    for name, weight, kind in (("backbone_object", 3.0, OBJECT), ("backbone_background", 5.0, BACKGROUND)):
        total = 0.0
        for one, other, cells in zip(adapted, others, kinds, strict=True):
            chosen = (cells == kind)[:, None].expand_as(one)
            total += ((one - other)[chosen] ** 2).sum().item() / max(1, 2 * chosen.sum().item())
        assert losses[name].item() == pytest.approx(weight * total / 3, rel=1e-5)
    sum(losses.values()).backward()
    assert any(parameter.grad is not None for parameter in student.backbone.body.parameters())
    assert all(parameter.grad is None for parameter in student.backbone.fpn.parameters())


def test_the_backbone_parts_gradients_are_the_formulas():
    torch.manual_seed(0)
    student, teacher = (detectors.build({**TINY, "strides": [4, 8, 16, 32]}, CLASSES) for _ in range(2))
    method = methods.build(BACKBONE_ONLY, student.train(), teacher.eval().requires_grad_(False)).double()
    with torch.no_grad():
        for adapter in method.backbone_adapters:
            adapter[0].weight.normal_(std=0.1)
    passed = one_pass(student)
    passed = dataclasses.replace(passed, backbone=wide(passed.backbone))
    ours = [passed.backbone[stride] for stride in (8, 16, 32)]
    adapted = [
        restated_convolution(one, adapter[0].weight, adapter[0].bias).clamp(min=0)
        for one, adapter in zip(ours, method.backbone_adapters, strict=True)
    ]
    boxes, sizes = [target["boxes"] for target in passed.targets], [tuple(one.shape[-2:]) for one in adapted]
    masks = restated_backbone_masks(boxes, *passed.images.shape[-2:], sizes)
    theirs = [one.double() for one in list(teacher.backbone.body(passed.images).values())[1:]]
    inside = restated_inside(passed.image_sizes, sizes, (8, 16, 32))
    assert not all(cells.all() for cells in inside)
    objects, background = restated_feature_loss(adapted, theirs, restated_kinds(masks, inside))
    losses = method(passed, teacher, START)
    inputs = [*ours, *method.backbone_adapters.parameters()]
    assert_same_loss(losses["backbone_object"], 3 * objects, inputs)
    assert_same_loss(losses["backbone_background"], 5 * background, inputs)


def test_backbones_without_a_common_stride_or_without_a_pyramid_are_refused():
    student, _ = pair()
    teacher = detectors.build(SSDLITE, CLASSES)
    with pytest.raises(RunError) as caught:
        methods.build(BACKBONE_ONLY, student, teacher)
    assert (caught.value.failure_class, caught.value.code) == ("user", "backbones_do_not_pair")
    assert "[8, 16], the teacher's []" in caught.value.detail
