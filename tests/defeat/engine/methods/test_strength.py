"""Warm-up and decay against their formulas, by hand."""

import math

import pytest

from defeat.engine.methods import StepInfo
from defeat.engine.methods.strength import strength


def by_epoch(decay, epochs):
    clocks = [StepInfo(step=0, steps=epochs, epoch=epoch, epochs=epochs) for epoch in range(epochs)]
    return [strength(step_info, warmup_steps=0, decay=decay) for step_info in clocks]


@pytest.mark.parametrize(
    ("decay", "epochs", "expected"),
    [
        ("constant", 3, [1, 1, 1]),
        ("linear", 4, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 3, [1, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2]),
        ("cosine", 2, [1, 0.5]),
        ("up_down", 4, [0.5, 1, 1, 0.5]),
        ("up_down", 5, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ("up_down", 2, [1, 1]),
    ],
)
def test_decay_by_epoch(decay, epochs, expected):
    assert by_epoch(decay, epochs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "up_down"])
def test_one_epoch_has_its_full_weight_and_no_epoch_is_idle(decay):
    assert by_epoch(decay, 1) == [1]
    assert all(0 < value <= 1 for epochs in range(1, 30) for value in by_epoch(decay, epochs))


def test_the_warmup_multiplies_the_decay():
    # 6 steps an epoch, 8 of warm-up: they reach into the second of three epochs.
    clocks = [StepInfo(step=step, steps=18, epoch=step // 6, epochs=3) for step in range(18)]
    values = [strength(step_info, warmup_steps=8, decay="linear") for step_info in clocks]
    expected = [min(1, (step + 1) / 8) * (1 - (step // 6) / 3) for step in range(18)]
    assert values == pytest.approx(expected, rel=1e-12)
