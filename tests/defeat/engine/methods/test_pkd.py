"""PKD's loss against its formula: loops and float64."""

import math

import pytest
import torch

from defeat.engine import methods
from defeat.engine.methods.pkd import pkd_loss
from defeat.engine.report import RunError
from tests.support.methods import START, assert_same_loss, levels, on_two_processes, one_pass, pair


def restated(student, teacher):
    """Half the mean squared difference of z-scores over images and cells of each channel, summed over levels."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student, teacher, strict=True):
        channels = ours.shape[1]
        for c in range(channels):
            scores = []
            for values in (list(ours[:, c].flatten()), list(theirs[:, c].flatten())):
                mean = sum(values) / len(values)
                deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
                scores.append([(value - mean) / (deviation + 1e-6) for value in values])
            squares = sum((mine - other) ** 2 for mine, other in zip(*scores, strict=True))
            total = total + 0.5 * squares / (len(scores[0]) * channels)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_the_restatement(seed):
    student, teacher = levels(seed)
    assert_same_loss(pkd_loss(student, teacher), restated(student, teacher), student)


def _apart(rank):
    """One process of two: the loss of its images, of unlike moments on the two, and its gradients."""
    student, teacher = _together()
    mine = [one[rank : 1 + 2 * rank].detach().requires_grad_() for one in student]
    loss = pkd_loss(mine, [one[rank : 1 + 2 * rank] for one in teacher])
    return loss.item(), [one.tolist() for one in torch.autograd.grad(loss, mine)]


def _together():
    generator = torch.Generator().manual_seed(2)
    student, teacher = (
        [torch.randn(3, channels, 4, 3, generator=generator, dtype=torch.float64) for channels in (3, 2)]
        for _ in range(2)
    )
    scale = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64).view(3, 1, 1, 1)
    student = [(scale * one + 3 * scale).requires_grad_() for one in student]
    return student, [one * scale.flip(0) for one in teacher]


def test_the_mean_over_two_processes_is_one_process_with_all_images(tmp_path):
    found = on_two_processes(_apart, tmp_path)
    student, teacher = _together()
    loss = pkd_loss(student, teacher)
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(loss.item(), rel=1e-12)
    for index, whole in enumerate(torch.autograd.grad(loss, student)):
        joined = torch.cat([torch.tensor(found[rank][1][index], dtype=torch.float64) for rank in range(2)])
        torch.testing.assert_close(joined / 2, whole, rtol=1e-9, atol=1e-13)


def test_a_large_mean_costs_no_precision():
    student, teacher = levels(3)
    far = [one.detach().float() + 1000 for one in student]
    expected = restated([one.double() for one in far], teacher)
    assert pkd_loss(far, [one.float() for one in teacher]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_levels_loss_is_one_minus_the_correlation():
    (student, *_), (teacher, *_) = levels(5)
    rows = [torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1] for c in range(3)]
    assert pkd_loss([student], [teacher]).item() == pytest.approx(1 - sum(rows).item() / 3, rel=1e-5)
    # So neither scale nor offset of the student's channels matters.
    assert pkd_loss([7 * student - 3], [teacher]).item() == pytest.approx(
        pkd_loss([student], [teacher]).item(), rel=1e-5
    )


def test_a_constant_channel_has_finite_gradients():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = pkd_loss([student], [torch.ones(2, 3, 4, 4)])
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad.isfinite().all()


def test_its_weight_is_the_authors_unless_given():
    student, teacher = pair(student_channels=16)
    assert methods.build({"method": "pkd"}, student, teacher).weight == 6
    student.head_kind = "one_stage"
    assert methods.build({"method": "pkd"}, student, teacher).weight == 10
    assert methods.build({"method": "pkd", "neck_weight": 0.5}, student, teacher).weight == 0.5


def test_the_method_is_the_loss_of_the_bare_maps():
    student, teacher = pair(student_channels=16)
    passed = one_pass(student)
    expected = 6 * pkd_loss(list(passed.features.values()), list(teacher.features(passed.images).values()))
    assert torch.equal(methods.build({"method": "pkd"}, student, teacher)(passed, teacher, START)["neck"], expected)


def test_unlike_channels_are_refused():
    with pytest.raises(RunError) as caught:
        methods.build({"method": "pkd"}, *pair(student_channels=8, teacher_channels=16))
    assert (caught.value.failure_class, caught.value.code) == ("user", "channels_differ")
    assert "8 channels, the teacher's 16" in caught.value.detail
