"""FitNet's loss against its formula: loops and float64."""

import pytest
import torch

from defeat.engine import methods
from defeat.engine.methods.fitnet import fitnet_loss
from tests.defeat.engine.methods.test_masks import restated_inside
from tests.support.methods import START, assert_same_loss, levels, on_two_processes, one_pass, pair


def restated(student, teacher, inside):
    """The mean over levels of the mean over the images' values of the squared difference."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs, cells in zip(student, teacher, inside, strict=True):
        batch, channels, height, width = ours.shape
        squares, values = torch.zeros((), dtype=torch.float64), 0
        for b in range(batch):
            for c in range(channels):
                for y in range(height):
                    for x in range(width):
                        if cells[b, y, x]:
                            squares = squares + (ours[b, c, y, x] - theirs[b, c, y, x]) ** 2
                            values += 1
        total = total + squares / values
    return total / len(student)


def padded(maps):
    """Which cells of these maps of two images are inside: each image is short of the other, or is not."""
    inside = [torch.ones(len(one), *one.shape[2:], dtype=torch.bool) for one in maps]
    inside[0][0, 3:], inside[0][1, :, 2:], inside[1][1, 1:] = False, False, False
    return inside


def everything(maps):
    return [torch.ones(len(one), *one.shape[2:], dtype=torch.bool) for one in maps]


@pytest.mark.parametrize("cells", [everything, padded])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_the_restatement(seed, cells):
    student, teacher = levels(seed)
    inside = cells(student)
    loss = fitnet_loss(student, teacher, inside)
    assert_same_loss(loss, restated(student, teacher, inside), student)
    for gradient, one in zip(torch.autograd.grad(loss, student), inside, strict=True):
        assert torch.equal((gradient == 0).all(dim=1), ~one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_padding_it_is_the_plain_mean_to_the_last_bit(dtype):
    torch.manual_seed(0)
    student = [torch.randn(2, 24, side, 33).to(dtype).requires_grad_() for side in (40, 21, 7)]
    teacher = [torch.randn_like(one) for one in student]
    wide = [one.to(torch.promote_types(dtype, torch.float32)) for one in student]
    plain = torch.stack([(one - other).square().mean() for one, other in zip(wide, teacher, strict=True)]).mean()
    loss = fitnet_loss(student, teacher, everything(student))
    assert torch.equal(loss, plain)
    gradients = (torch.autograd.grad(one, student) for one in (loss, plain))
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


def _half(rank):
    """One process of two: the loss of one of two images, and its gradients."""
    student, teacher = levels(7)
    own = slice(rank, rank + 1)
    mine = [one[own].detach().requires_grad_() for one in student]
    loss = fitnet_loss(mine, [one[own] for one in teacher], [one[own] for one in padded(student)])
    return loss.item(), [one.tolist() for one in torch.autograd.grad(loss, mine)]


def test_the_mean_over_two_processes_is_one_process_with_both_images(tmp_path):
    found = on_two_processes(_half, tmp_path)
    student, teacher = levels(7)
    loss = fitnet_loss(student, teacher, padded(student))
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(loss.item(), rel=1e-12)
    for index, whole in enumerate(torch.autograd.grad(loss, student)):
        joined = torch.cat([torch.tensor(found[rank][1][index], dtype=torch.float64) for rank in range(2)])
        torch.testing.assert_close(joined / 2, whole, rtol=1e-10, atol=1e-14)


def test_each_level_has_a_1x1_adapter_even_where_channels_are_equal():
    for channels in (8, 16):
        student, teacher = pair(student_channels=channels)
        method = methods.build({"method": "fitnet", "neck_weight": 3.0}, student, teacher)
        shapes = [tuple(adapter.weight.shape) for adapter in method.adapters]
        assert shapes == [(16, channels, 1, 1)] * len(student.strides)
        passed = one_pass(student)
        adapted = [adapter(one) for adapter, one in zip(method.adapters, passed.features.values(), strict=True)]
        inside = restated_inside(passed.image_sizes, [one.shape[-2:] for one in adapted], student.strides)
        assert not all(cells.all() for cells in inside)
        expected = 3 * fitnet_loss(adapted, list(teacher.features(passed.images).values()), inside)
        loss = method(passed, teacher, START)["neck"]
        assert torch.equal(loss, expected)
        maps = list(passed.features.values())
        for gradient, cells in zip(torch.autograd.grad(loss, maps), inside, strict=True):
            assert torch.equal((gradient == 0).all(dim=1), ~cells)
