"""FGFI's masks and loss against the paper's description: loops and float64."""

import pytest
import torch

from defeat.engine import detectors, methods
from defeat.engine.methods.fgfi import fgfi_loss, imitation_masks
from defeat.engine.report import RunError
from tests.support.methods import START, assert_same_loss, levels, one_pass, pair
from tests.support.one_stage import FCOS, RETINANET
from tests.support.training import CLASSES, TINY, images_and_targets


def overlap(a, b):
    """IoU of two boxes, x1 y1 x2 y2."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def restated_masks(boxes, anchors, sizes, threshold):
    masks = [torch.zeros(len(boxes), *size, dtype=torch.bool) for size in sizes]
    for image, of_image in enumerate(boxes):
        for box in of_image.tolist():
            best = max(overlap(box, anchor) for level in anchors for anchor in level.tolist())
            for level, (height, width) in enumerate(sizes):
                per_cell = len(anchors[level]) // (height * width)
                for index, anchor in enumerate(anchors[level].tolist()):
                    if overlap(box, anchor) > threshold * best:
                        row, column = divmod(index // per_cell, width)
                        masks[level][image, row, column] = True
    return masks


def restated_loss(student, teacher, masks):
    """1 / (2 N) times the sum over masked cells and channels of squares."""
    cells, squares = 0, torch.zeros((), dtype=torch.float64)
    for ours, theirs, mask in zip(student, teacher, masks, strict=True):
        for b, y, x in mask.nonzero().tolist():
            cells += 1
            for c in range(ours.shape[1]):
                squares = squares + (ours[b, c, y, x] - theirs[b, c, y, x]) ** 2
    return squares / max(1, 2 * cells)


def grid(sizes, strides, generator):
    """Anchors of three random shapes on each cell, float64."""
    found = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        half = stride * (1 + 3 * torch.rand(3, 2, generator=generator, dtype=torch.float64))
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = torch.stack([columns, rows], dim=-1).reshape(-1, 1, 2) * stride
        found.append(torch.cat([centre - half, centre + half], dim=2).reshape(-1, 4))
    return found


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_masks_equal_the_restatement(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(6, 8), (3, 4), (2, 2)]
    anchors = grid(sizes, (8, 16, 32), generator)
    corners = 40 * torch.rand(2, 3, 2, generator=generator, dtype=torch.float64)
    boxes = [torch.cat([one, one + 2 + 30 * torch.rand(3, 2, generator=generator)], dim=1) for one in corners]
    boxes.append(torch.zeros(0, 4, dtype=torch.float64))
    ours = imitation_masks(boxes, anchors, sizes=sizes, threshold=threshold)
    for mine, plain in zip(ours, restated_masks(boxes, anchors, sizes, threshold), strict=True):
        assert torch.equal(mine, plain)
        assert not mine[-1].any()


def test_each_box_marks_its_best_anchor_and_one_that_no_anchor_touches_nothing():
    anchors, sizes = [torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]]), torch.tensor([[0.0, 0, 16, 16]])], [(1, 2), (1, 1)]
    boxes = [torch.tensor([[9.0, 1, 15, 7]]), torch.tensor([[100.0, 100, 110, 110]])]
    fine, coarse = imitation_masks(boxes, anchors, sizes=sizes, threshold=0.5)
    assert fine.tolist() == [[[False, True]], [[False, False]]]
    assert coarse.tolist() == [[[False]], [[False]]]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_loss_and_gradients_equal_the_restatement(share):
    student, teacher = levels(1)
    generator = torch.Generator().manual_seed(4)
    masks = [torch.rand(len(one), *one.shape[2:], generator=generator) < share for one in student]
    loss = fgfi_loss(student, teacher, masks)
    if share == 0:
        assert loss.item() == 0
        return
    assert_same_loss(loss, restated_loss(student, teacher, masks), student)


@pytest.mark.parametrize("family", [TINY, RETINANET], ids=["faster_rcnn", "retinanet"])
def test_the_method_masks_by_the_students_own_anchors(family):
    torch.manual_seed(0)
    student = detectors.build({**family, "pyramid_channels": 8}, CLASSES).train()
    teacher = pair()[1]
    passed = one_pass(student)
    plain_anchors = []
    generator = student.rpn.anchor_generator if family is TINY else student.anchor_generator
    for stride, base in zip(student.strides, generator.cell_anchors, strict=True):
        height, width = passed.images.shape[-2] // stride, passed.images.shape[-1] // stride
        cells = [(x * stride, y * stride) for y in range(height) for x in range(width)]
        plain_anchors.append(torch.stack([one + torch.tensor([x, y, x, y]) for x, y in cells for one in base]))
    assert all(torch.equal(mine, plain) for mine, plain in zip(passed.anchors, plain_anchors, strict=True))
    method = methods.build({"method": "fgfi", "neck_weight": 3.0, "threshold": 0.3}, student, teacher)
    adapted = [adapter(one) for adapter, one in zip(method.adapters, passed.features.values(), strict=True)]
    sizes = [tuple(one.shape[-2:]) for one in adapted]
    boxes = [target["boxes"] for target in passed.targets]
    masks = imitation_masks(boxes, plain_anchors, sizes=sizes, threshold=0.3)
    expected = 3 * fgfi_loss(adapted, list(teacher.features(passed.images).values()), masks)
    assert torch.equal(method(passed, teacher, START)["neck"], expected)


def test_a_student_without_anchors_is_refused_and_a_teacher_without_is_none_of_its_business():
    student, teacher = detectors.build(FCOS, CLASSES), pair()[1]
    with pytest.raises(RunError) as caught:
        methods.build({"method": "fgfi"}, student, teacher)
    assert (caught.value.failure_class, caught.value.code) == ("user", "anchors_missing")
    assert "the family fcos provides none" in caught.value.detail
    with_anchors = pair()[0]
    method = methods.build({"method": "fgfi"}, with_anchors, student.eval())
    assert method(one_pass(with_anchors), student, START)["neck"].item() > 0
    assert student.train().forward_train(*images_and_targets()).anchors is None
