"""CWD's loss against its formula: loops and float64."""

import pytest
import torch
from torch import nn

from defeat.engine import methods
from defeat.engine.methods.cwd import cwd_loss
from tests.support.methods import START, assert_same_loss, levels, one_pass, pair


def restated(student, teacher, t):
    """`t^2 / (C N) * sum of KL(teacher || student)` of softmaxes over cells, summed over levels."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student, teacher, strict=True):
        batch, channels = ours.shape[:2]
        for b in range(batch):
            for c in range(channels):
                mine = [(value / t).exp() for value in ours[b, c].flatten()]
                other = [(value / t).exp() for value in theirs[b, c].flatten()]
                for q, p in zip(mine, other, strict=True):
                    p_share, q_share = p / sum(other), q / sum(mine)
                    total = total + t**2 / (channels * batch) * p_share * (p_share / q_share).log()
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_loss_and_gradients_equal_the_restatement(temperature):
    student, teacher = levels(1)
    ours = cwd_loss(student, teacher, temperature=temperature)
    assert_same_loss(ours, restated(student, teacher, temperature), student)


def test_there_is_an_adapter_where_channels_differ():
    student, teacher = pair(student_channels=8)
    method = methods.build({"method": "cwd"}, student, teacher)
    assert [tuple(adapter.weight.shape) for adapter in method.adapters] == [(16, 8, 1, 1)] * 2
    student, teacher = pair(student_channels=16)
    method = methods.build({"method": "cwd"}, student, teacher)
    assert all(isinstance(adapter, nn.Identity) for adapter in method.adapters)
    passed = one_pass(student)
    bare = cwd_loss(list(passed.features.values()), list(teacher.features(passed.images).values()), temperature=1.0)
    assert torch.equal(method(passed, teacher, START)["neck"], 10 * bare)
