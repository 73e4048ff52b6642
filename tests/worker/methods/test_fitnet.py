"""FitNet's loss against its formula: loops and float64."""

import pytest
import torch

from tests.worker.methods.support import START, assert_same_loss, levels, one_pass, pair
from worker import methods
from worker.methods.fitnet import fitnet_loss


def restated(student, teacher):
    """The mean over levels of the mean over values of the squared difference."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student, teacher, strict=True):
        batch, channels, height, width = ours.shape
        squares = torch.zeros((), dtype=torch.float64)
        for b in range(batch):
            for c in range(channels):
                for y in range(height):
                    for x in range(width):
                        squares = squares + (ours[b, c, y, x] - theirs[b, c, y, x]) ** 2
        total = total + squares / (batch * channels * height * width)
    return total / len(student)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_the_restatement(seed):
    student, teacher = levels(seed)
    assert_same_loss(fitnet_loss(student, teacher), restated(student, teacher), student)


def test_each_level_has_a_1x1_adapter_even_where_channels_are_equal():
    for channels in (8, 16):
        student, teacher = pair(student_channels=channels)
        method = methods.build({"method": "fitnet", "neck_weight": 3.0}, student, teacher)
        shapes = [tuple(adapter.weight.shape) for adapter in method.adapters]
        assert shapes == [(16, channels, 1, 1)] * len(student.strides)
        passed = one_pass(student)
        adapted = [adapter(one) for adapter, one in zip(method.adapters, passed.features.values(), strict=True)]
        expected = 3 * fitnet_loss(adapted, list(teacher.trunk(passed.images).values()))
        assert torch.equal(method(passed, teacher, START)["neck"], expected)
