"""The losses against a plain restatement of the formulas: loops and float64, written from the description."""

import math

import pytest
import torch

from defeat.engine.methods import losses
from defeat.engine.methods.losses import decoupled_feature_loss, decoupled_logit_loss
from defeat.engine.methods.masks import BACKGROUND, OBJECT, PADDING
from tests.support.methods import on_two_processes


def restated_feature_loss(student, teacher, kinds):
    """`1 / max(1, 2 C n) * sum(M (S - T)^2)` by level and kind, mean over levels; padding is of no kind."""
    objects, background = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ours, theirs, cells in zip(student, teacher, kinds, strict=True):
        batch, channels, height, width = ours.shape
        n_object = n_background = 0
        sum_object = sum_background = torch.zeros((), dtype=torch.float64)
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    squares = sum((ours[b, c, y, x] - theirs[b, c, y, x]) ** 2 for c in range(channels))
                    if cells[b, y, x] == OBJECT:
                        n_object += channels
                        sum_object = sum_object + squares
                    elif cells[b, y, x] == BACKGROUND:
                        n_background += channels
                        sum_background = sum_background + squares
        objects = objects + sum_object / max(1, 2 * n_object)
        background = background + sum_background / max(1, 2 * n_background)
    return objects / len(kinds), background / len(kinds)


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
    kinds = [random_kinds((b, h, w), generator) for b, _, h, w in shapes]
    if request.param == 1:
        kinds[0][:] = BACKGROUND  # a level without objects
    if request.param == 2:
        kinds[1][:] = OBJECT  # a level without background
    if request.param == 3:
        kinds[0][0, 3:], kinds[0][0, :, 2:], kinds[2][1] = PADDING, PADDING, PADDING
    return student, teacher, kinds


def random_kinds(shape, generator):
    """Objects on some cells, and background on the others."""
    return torch.where(torch.rand(shape, generator=generator) < 0.4, OBJECT, BACKGROUND).byte()


def test_feature_loss_and_gradients_equal_the_restatement(features):
    student, teacher, kinds = features
    ours = decoupled_feature_loss(student, teacher, kinds)
    theirs = restated_feature_loss(student, teacher, kinds)
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.item() == pytest.approx(plain.item(), rel=1e-12)
    weighted = [4.0 * parts[0] + 16.0 * parts[1] for parts in (ours, theirs)]
    gradients = [torch.autograd.grad(loss, student, retain_graph=True) for loss in weighted]
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-12)


def test_what_lies_under_the_padding_counts_nowhere_and_has_no_gradient(features):
    student, teacher, kinds = features
    kinds[0][1, 2:], kinds[1][0, :, 1:] = PADDING, PADDING
    others = [
        torch.where(cells[:, None] == PADDING, torch.inf, ours.detach()).requires_grad_()
        for ours, cells in zip(student, kinds, strict=True)
    ]
    found = [decoupled_feature_loss(maps, teacher, kinds) for maps in (student, others)]
    assert all(torch.equal(plain, mine) for plain, mine in zip(*found, strict=True))
    gradients = torch.autograd.grad(4.0 * found[0][0] + 16.0 * found[0][1], student)
    for gradient, cells in zip(gradients, kinds, strict=True):
        assert torch.equal((gradient == 0).all(dim=1), cells == PADDING)


def test_feature_loss_in_small_blocks_is_the_same(features, monkeypatch):
    student, teacher, kinds = features
    whole = decoupled_feature_loss(student, teacher, kinds)
    monkeypatch.setitem(losses.BLOCK, "cpu", 25)
    cut = decoupled_feature_loss(student, teacher, kinds)
    for mine, plain in zip(cut, whole, strict=True):
        assert mine.item() == pytest.approx(plain.item(), rel=1e-12)
        gradients = [torch.autograd.grad(loss, student, retain_graph=True) for loss in (mine, plain)]
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(features, dtype):
    student, teacher, kinds = features
    ours = [(300 * one).detach().float().requires_grad_() for one in student]
    theirs = [300 * one.float() for one in teacher]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            parts = decoupled_feature_loss(ours, theirs, kinds)
            found.append([*parts, *torch.autograd.grad(sum(parts), ours)])
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))


def test_gradients_in_half_are_those_of_float32_rounded(features):
    student, teacher, kinds = features
    halves = [one.detach().bfloat16().requires_grad_() for one in student]
    singles = [one.detach().float().requires_grad_() for one in halves]
    for dtype in (torch.bfloat16, torch.float32):
        others = [one.to(dtype) for one in teacher]
        rounded = [one.float() for one in others]
        mine = torch.autograd.grad(sum(decoupled_feature_loss(halves, others, kinds)), halves)
        plain = torch.autograd.grad(sum(decoupled_feature_loss(singles, rounded, kinds)), singles)
        assert all(torch.equal(one, other.bfloat16()) for one, other in zip(mine, plain, strict=True))


def _half(rank):
    """One process of two: the loss of its half of the batch, and its gradients."""
    student, teacher, kinds, logits, others, labels = _joined()
    half = slice(rank, rank + 1)
    mine = [one[half].detach().requires_grad_() for one in student]
    own = logits[4 * rank : 4 * rank + 4].detach().requires_grad_()
    rows = slice(4 * rank, 4 * rank + 4)
    theirs, cells = [one[half] for one in teacher], [one[half] for one in kinds]
    loss = _total(mine, theirs, cells, own, others[rows], labels[rows])
    return loss.item(), [one.tolist() for one in torch.autograd.grad(loss, [*mine, own])]


def _joined():
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 3, 5, 4), (2, 3, 2, 2), (2, 3, 1, 1)]
    student = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    teacher = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    kinds = [random_kinds((b, h, w), generator) for b, _, h, w in shapes]
    kinds[0][0, 3:], kinds[0][1, :, 2:] = PADDING, PADDING  # unlike numbers of cells on the two
    kinds[1][0], kinds[1][1] = BACKGROUND, OBJECT  # one rank has no object there, the other no background
    kinds[2][:] = BACKGROUND
    logits = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    others = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return student, teacher, kinds, logits, others, torch.tensor([1, 0, 0, 0, 2, 3, 1, 0])


def _total(student, teacher, kinds, logits, others, labels):
    objects, background = decoupled_feature_loss(student, teacher, kinds)
    head = decoupled_logit_loss(logits, others, labels, object_temperature=1.0, background_temperature=2.0)
    return 4 * objects + 16 * background + 2 * sum(head)


def test_the_mean_over_two_processes_is_one_process_with_both_batches(tmp_path):
    found = on_two_processes(_half, tmp_path)
    student, teacher, kinds, logits, others, labels = _joined()
    loss = _total(student, teacher, kinds, logits, others, labels)
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(loss.item(), rel=1e-12)
    for index, whole in enumerate(torch.autograd.grad(loss, [*student, logits])):
        joined = torch.cat([torch.tensor(found[rank][1][index], dtype=torch.float64) for rank in range(2)])
        # Each rank's gradient is of its own images alone; the average over ranks halves it.
        torch.testing.assert_close(joined / 2, whole, rtol=1e-10, atol=1e-14)


def test_feature_loss_in_float32_and_half_is_the_same_number(features):
    student, teacher, kinds = features
    exact = decoupled_feature_loss(student, teacher, kinds)
    single = decoupled_feature_loss([s.float() for s in student], [t.float() for t in teacher], kinds)
    for mine, plain in zip(single, exact, strict=True):
        assert mine.dtype == torch.float32
        assert mine.item() == pytest.approx(plain.item(), rel=1e-5)
    half = decoupled_feature_loss([100 * s.bfloat16() for s in student], [t.bfloat16() for t in teacher], kinds)
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
    parts = decoupled_feature_loss([student], [teacher], [random_kinds((2, 4, 4), None)])
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
