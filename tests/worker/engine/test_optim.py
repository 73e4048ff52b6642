"""The learning rate is a function of the step."""

import math

import pytest
import torch

from worker.engine.config import ScheduleConfig
from worker.engine.optim import build_optimizer, learning_rate


def rates(schedule, steps_per_epoch=10):
    total = schedule.epochs * steps_per_epoch
    return [learning_rate(schedule, step=step, steps_per_epoch=steps_per_epoch) for step in range(total)]


def test_warm_up_then_steps():
    schedule = ScheduleConfig(epochs=4, learning_rate=0.1, warmup_steps=5, decay_epochs=(2, 3))
    found = rates(schedule)
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert found[5:20] == pytest.approx([0.1] * 15)
    assert found[20:30] == pytest.approx([0.01] * 10)
    assert found[30:] == pytest.approx([0.001] * 10)


def test_cosine_falls_from_the_rate_to_nothing():
    schedule = ScheduleConfig(epochs=5, learning_rate=1.0, warmup_steps=0, decay="cosine")
    found = rates(schedule)
    assert found[0] == 1.0
    assert found[25] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 49 / 50)))
    assert found == sorted(found, reverse=True)


def test_optimizers_take_only_what_wants_gradients():
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    free = torch.nn.Parameter(torch.zeros(1))
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = build_optimizer([frozen, free], ScheduleConfig(optimizer=name))
        assert isinstance(optimizer, kind)
        assert [id(one) for group in optimizer.param_groups for one in group["params"]] == [id(free)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"epochs": 4, "decay_epochs": (4,)}, "must be below epochs = 4"),
        ({"decay": "cosine", "decay_epochs": (2,)}, "belong to decay: step"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"optimizer": "lion"}, "'sgd' or 'adamw'"),
    ],
)
def test_wrong_values_are_named(values, says):
    with pytest.raises(ValueError, match=says):
        ScheduleConfig(**values)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(4, 10), (1, 3), (3, 7), (1, 2)])
def test_one_cycle_is_torchs(epochs, steps_per_epoch):
    schedule = ScheduleConfig(epochs=epochs, learning_rate=0.4, decay="one_cycle", warmup_steps=5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = epochs * steps_per_epoch
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < steps:
            theirs.step()
    assert rates(schedule, steps_per_epoch) == pytest.approx(expected, rel=1e-9)
