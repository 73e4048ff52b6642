"""PKD's loss against its formula: loops and float64."""

import math

import pytest
import torch

from tests.worker.methods.support import START, assert_same_loss, levels, one_pass, pair
from worker import methods
from worker.methods.pkd import pkd_loss
from worker.report import RunError


def restated(student, teacher):
    """Half the mean squared difference of z-scores over pictures and cells of each channel, summed over levels."""
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
    expected = 6 * pkd_loss(list(passed.features.values()), list(teacher.trunk(passed.images).values()))
    assert torch.equal(methods.build({"method": "pkd"}, student, teacher)(passed, teacher, START)["neck"], expected)


def test_unlike_channels_are_refused():
    with pytest.raises(RunError) as caught:
        methods.build({"method": "pkd"}, *pair(student_channels=8, teacher_channels=16))
    assert (caught.value.failure_class, caught.value.code) == ("user", "channels_differ")
    assert "8 channels, the teacher's 16" in caught.value.detail
