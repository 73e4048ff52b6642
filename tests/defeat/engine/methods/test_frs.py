"""FRS's losses against their formulas: loops and float64."""

import math

import pytest
import torch

from defeat.engine import detectors, methods
from defeat.engine.methods import StepInfo
from defeat.engine.methods.frs import frs_logit_loss, frs_neck_loss, richness
from defeat.engine.report import RunError
from tests.support.methods import START, assert_same_loss, levels, one_pass, pair
from tests.support.one_stage import FCOS, RETINANET
from tests.support.training import CLASSES, TINY


def logits(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def restated(student, teacher, logits_student, logits_teacher):
    """Both losses: of each level, weighted by the largest sigmoid of a cell, over the sum of these."""
    neck = scores = torch.zeros((), dtype=torch.float64)
    for ours, theirs, mine, other in zip(student, teacher, logits_student, logits_teacher, strict=True):
        batch, channels, height, width = ours.shape
        total = neck_sum = score_sum = torch.zeros((), dtype=torch.float64)
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    p = [1 / (1 + math.exp(-value)) for value in other[b, :, :, y, x].flatten().tolist()]
                    q = [1 / (1 + (-value).exp()) for value in mine[b, :, :, y, x].flatten()]
                    total = total + max(p)
                    squares = sum((ours[b, c, y, x] - theirs[b, c, y, x]) ** 2 for c in range(channels))
                    neck_sum = neck_sum + max(p) * squares
                    entropy = -sum(t * s.log() + (1 - t) * (1 - s).log() for t, s in zip(p, q, strict=True))
                    score_sum = score_sum + max(p) * entropy
        neck, scores = neck + neck_sum / total, scores + score_sum / total
    return neck, scores


@pytest.mark.parametrize("seed", range(2))
def test_losses_and_gradients_equal_the_restatement(seed):
    student, teacher = levels(seed)
    shapes = [(2, 3, 2, *one.shape[2:]) for one in student]
    ours, theirs = [one.requires_grad_() for one in logits(shapes, seed)], logits(shapes, seed + 10)
    scores = [richness(one) for one in theirs]
    neck, entropy = restated(student, teacher, ours, theirs)
    assert_same_loss(frs_neck_loss(student, teacher, scores), neck, student)
    assert_same_loss(frs_logit_loss(ours, theirs, scores), entropy, ours)


def test_a_teacher_that_sees_nothing_gives_finite_losses():
    student, teacher = levels(0)
    scores = [torch.zeros(len(one), *one.shape[2:], dtype=one.dtype) for one in student]
    loss = frs_neck_loss(student, teacher, scores)
    assert loss.item() > 0
    assert math.isfinite(loss.item())


def alike(family, **changes):
    torch.manual_seed(0)
    student = detectors.build({**family, **changes}, CLASSES).train()
    return student, detectors.build(family, CLASSES).eval().requires_grad_(False)


@pytest.mark.parametrize("family", [RETINANET, FCOS], ids=["retinanet", "fcos"])
def test_a_one_stage_head_is_compared_class_by_class_without_column_zero(family):
    student, teacher = alike(family)
    passed = one_pass(student)
    method = methods.build({"method": "frs", "warmup_steps": 0}, student, teacher)
    assert (method.neck_weight, method.logits_weight) == (0.005, 0.02)
    sets = []
    for detector in (student, teacher):
        maps = (
            list(detector.features(passed.images).values()) if detector is teacher else list(passed.features.values())
        )
        head = detector.head.classification_head
        raw = [head.cls_logits(head.conv(one)) for one in maps]
        shaped = [one.unflatten(1, (head.num_anchors, head.num_classes)) for one in raw]
        sets.append([one[:, :, 1:] for one in shaped])
    for mine, plain in zip(passed.cell_logits, sets[0], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    scores = [richness(one) for one in sets[1]]
    losses = method(passed, teacher, START)
    assert losses["logits"].item() == pytest.approx(0.02 * frs_logit_loss(sets[0], sets[1], scores).item(), rel=1e-5)
    adapted = [adapter(one) for adapter, one in zip(method.adapters, passed.features.values(), strict=True)]
    expected = 0.005 * frs_neck_loss(adapted, list(teacher.features(passed.images).values()), scores).item()
    assert losses["neck"].item() == pytest.approx(expected, rel=1e-5)


def test_of_two_stage_detectors_the_proposal_networks_are_compared():
    student, teacher = pair()
    passed = one_pass(student)
    method = methods.build({"method": "frs", "warmup_steps": 0}, student, teacher)
    assert (method.neck_weight, method.logits_weight) == (0.002, 0.1)
    ours = [one[:, :, None] for one in student.rpn.head(list(passed.features.values()))[0]]
    theirs = [one[:, :, None] for one in teacher.rpn.head(list(teacher.features(passed.images).values()))[0]]
    expected = 0.1 * frs_logit_loss(ours, theirs, [richness(one) for one in theirs])
    losses = method(passed, teacher, START)
    assert torch.equal(losses["logits"], expected)
    losses["logits"].backward()
    assert student.rpn.head.cls_logits.weight.grad.norm() > 0


def test_warmup_scales_both_losses():
    student, teacher = pair()
    full = methods.build({"method": "frs", "warmup_steps": 0}, student, teacher)
    part = methods.build({"method": "frs", "warmup_steps": 8}, student, teacher)
    part.load_state_dict(full.state_dict())
    passed, step_info = one_pass(student), StepInfo(step=3, steps=12, epoch=0, epochs=1)
    halves = part(passed, teacher, step_info)
    for name, loss in full(passed, teacher, step_info).items():
        assert halves[name].item() == pytest.approx(loss.item() / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param(RETINANET, None, id="one-stage-from-two-stage"),
        pytest.param(RETINANET, FCOS, id="unlike-anchors"),
        pytest.param({**RETINANET, "anchor_octaves": 3}, RETINANET, id="unlike-octaves"),
        # As many to a cell, but of other sides and ratios.
        pytest.param(
            {**RETINANET, "anchor_octaves": 3, "anchor_ratios": [1.0]},
            {**RETINANET, "anchor_octaves": 1, "anchor_ratios": [0.5, 1.0, 2.0]},
            id="as-many-anchors",
        ),
        pytest.param({**RETINANET, "anchor_scale": 4}, RETINANET, id="unlike-sides"),
        pytest.param({**RETINANET, "anchor_octaves": 1, "anchor_ratios": [1.0]}, FCOS, id="an-anchor-and-a-point"),
        pytest.param({**FCOS, "anchor_scale": 6}, FCOS, id="unlike-points"),
        pytest.param({**TINY, "anchor_ratios": [0.5, 1.0, 3.0]}, None, id="unlike-ratios"),
    ],
)
def test_heads_that_do_not_score_alike_are_refused_unless_only_the_neck_is_wanted(student, teacher):
    student = detectors.build(student, CLASSES).train()
    teacher = detectors.build(teacher, CLASSES).eval() if teacher else pair()[1]
    with pytest.raises(RunError) as caught:
        methods.build({"method": "frs"}, student, teacher)
    assert (caught.value.failure_class, caught.value.code) == ("user", "logits_do_not_pair")
    method = methods.build({"method": "frs", "logits_weight": 0}, student, teacher)
    assert method(one_pass(student), teacher, START).keys() == {"neck"}


def test_unlike_anchors_are_named_with_what_would_do():
    detector = {**RETINANET, "anchor_octaves": 1}
    student, teacher = alike(detector, anchor_scale=5)
    with pytest.raises(RunError) as caught:
        methods.build({"method": "frs"}, student, teacher)
    assert (
        "at stride 8 the student has anchors of 40 px in ratios 0.5, 1, 2, the teacher anchors of 24 px in ratios "
        "0.5, 1, 2; give the student the teacher's anchors, or set logits_weight to 0"
    ) in caught.value.detail


def test_only_anchors_of_paired_levels_count():
    student, teacher = alike({**RETINANET, "strides": [8, 16, 32]}, strides=[16, 32])
    method = methods.build({"method": "frs"}, student, teacher)
    assert method(one_pass(student), teacher, START).keys() == {"neck", "logits"}


def test_a_teacher_that_scores_no_cells_is_refused():
    student, teacher = pair()
    teacher.provides = ()
    with pytest.raises(RunError) as caught:
        methods.build({"method": "frs", "logits_weight": 0}, student, teacher)
    assert caught.value.code == "logits_missing"
