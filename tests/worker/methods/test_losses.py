"""The losses against a plain restatement of the formulas: loops and float64, written from the description."""

import math

import pytest
import torch

from worker.methods.losses import decoupled_feature_loss, decoupled_logit_loss


def restated_feature_loss(student, teacher, masks):
    """`1 / max(1, 2 C n) * sum(M (S - T)^2)` by level and kind, mean over levels."""
    objects, background = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ours, theirs, mask in zip(student, teacher, masks, strict=True):
        batch, channels, height, width = ours.shape
        n_object = n_background = 0
        sum_object = sum_background = torch.zeros((), dtype=torch.float64)
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    squares = sum((ours[b, c, y, x] - theirs[b, c, y, x]) ** 2 for c in range(channels))
                    if mask[b, 0, y, x]:
                        n_object += channels
                        sum_object = sum_object + squares
                    else:
                        n_background += channels
                        sum_background = sum_background + squares
        objects = objects + sum_object / max(1, 2 * n_object)
        background = background + sum_background / max(1, 2 * n_background)
    return objects / len(masks), background / len(masks)


def restated_logit_loss(student, teacher, labels, t_object, t_background):
    """`T^2 / K * sum KL(teacher || student; T)` over positives and over negatives."""
    sums = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
    counts = {True: 0, False: 0}
    for row, label in enumerate(labels.tolist()):
        positive = label > 0
        t = t_object if positive else t_background
        ours = [value / t for value in student[row]]
        theirs = [value / t for value in teacher[row]]
        norm_ours = sum(value.exp() for value in ours)
        norm_theirs = sum(value.exp() for value in theirs)
        for s, q in zip(ours, theirs, strict=True):
            p = q.exp() / norm_theirs
            sums[positive] = sums[positive] + t**2 * p * ((p).log() - (s.exp() / norm_ours).log())
        counts[positive] += 1
    return sums[True] / max(1, counts[True]), sums[False] / max(1, counts[False])


@pytest.fixture(params=range(4))
def features(request):
    generator = torch.Generator().manual_seed(request.param)
    shapes = [(2, 3, 5, 4), (2, 3, 3, 2), (2, 3, 1, 1)]
    student = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    teacher = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    masks = [torch.rand(b, 1, h, w, generator=generator) < 0.4 for b, _, h, w in shapes]
    if request.param == 1:
        masks[0][:] = False  # a level without objects
    if request.param == 2:
        masks[1][:] = True  # a level without background
    return student, teacher, masks


def test_feature_loss_and_gradients_equal_the_restatement(features):
    student, teacher, masks = features
    ours = decoupled_feature_loss(student, teacher, masks)
    theirs = restated_feature_loss(student, teacher, masks)
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.item() == pytest.approx(plain.item(), rel=1e-12)
    weighted = [4.0 * parts[0] + 16.0 * parts[1] for parts in (ours, theirs)]
    gradients = [torch.autograd.grad(loss, student, retain_graph=True) for loss in weighted]
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-12)


def test_feature_loss_in_float32_and_half_is_the_same_number(features):
    student, teacher, masks = features
    exact = decoupled_feature_loss(student, teacher, masks)
    single = decoupled_feature_loss([s.float() for s in student], [t.float() for t in teacher], masks)
    for mine, plain in zip(single, exact, strict=True):
        assert mine.dtype == torch.float32
        assert mine.item() == pytest.approx(plain.item(), rel=1e-5)
    half = decoupled_feature_loss([100 * s.bfloat16() for s in student], [t.bfloat16() for t in teacher], masks)
    assert all(part.dtype == torch.float32 and math.isfinite(part.item()) for part in half)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.5), (4.0, 10.0)])
@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 3], [0, 0, 0, 0, 0], [1, 2, 3, 1, 2]])
def test_logit_loss_and_gradients_equal_the_restatement(temperatures, labels):
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    ours = decoupled_logit_loss(
        student,
        teacher,
        torch.tensor(labels),
        object_temperature=temperatures[0],
        background_temperature=temperatures[1],
    )
    theirs = restated_logit_loss(student, teacher, torch.tensor(labels), *temperatures)
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.item() == pytest.approx(plain.item(), rel=1e-10, abs=1e-15)
    gradients = [
        torch.autograd.grad(parts[0] + 2 * parts[1], student, retain_graph=True)[0] for parts in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-12)


def test_no_gradient_reaches_the_teacher():
    teacher = torch.randn(2, 3, 4, 4, requires_grad=True)
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    parts = decoupled_feature_loss([student], [teacher], [torch.rand(2, 1, 4, 4) > 0.5])
    logits = torch.randn(6, 3, requires_grad=True)
    more = decoupled_logit_loss(
        torch.randn(6, 3, requires_grad=True),
        logits,
        torch.tensor([0, 1, 2, 0, 1, 2]),
        object_temperature=1.0,
        background_temperature=1.0,
    )
    (sum(parts) + sum(more)).backward()
    assert teacher.grad is None
    assert logits.grad is None


def test_equal_inputs_cost_nothing():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    parts = decoupled_logit_loss(logits, logits, labels, object_temperature=2.0, background_temperature=3.0)
    assert [round(part.item(), 6) for part in parts] == [0, 0]
