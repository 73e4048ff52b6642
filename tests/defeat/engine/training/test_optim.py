"""The learning rate is a function of the step; what the optimiser is given, and what it will take."""

import copy
import math

import pytest
import torch

from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.optim import build_optimizer, learning_rate, restore, state_bytes


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


def modules():
    """A convolution with a norm, whose own bias is frozen, and an adapter."""
    detector = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    detector[0].bias.requires_grad_(False)
    return detector, torch.nn.Conv2d(4, 2, 1)


def ids(parameters):
    return [id(one) for one in parameters]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_detector_and_method_have_groups_of_their_own(name, kind):
    detector, adapter = modules()
    optimizer = build_optimizer([detector, adapter], ScheduleConfig(optimizer=name, weight_decay=0.1))
    assert isinstance(optimizer, kind)
    (convolution, _), norm = (list(one.parameters()) for one in detector)
    assert [ids(group["params"]) for group in optimizer.param_groups] == [
        ids([convolution, *norm]),
        ids(adapter.parameters()),
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_norms_and_biases_may_be_left_out_of_weight_decay():
    detector, adapter = modules()
    optimizer = build_optimizer([detector, adapter], ScheduleConfig(weight_decay=0.1, norm_weight_decay=False))
    found = [(ids(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        (ids([detector[0].weight]), 0.1),
        (ids(detector[1].parameters()), 0.0),
        (ids([adapter.weight]), 0.1),
        (ids([adapter.bias]), 0.0),
    ]


def test_a_method_without_parameters_has_no_group():
    detector, _ = modules()
    assert len(build_optimizer([detector, torch.nn.Identity()], ScheduleConfig()).param_groups) == 1


@pytest.mark.parametrize(("changes", "copies"), [({}, 1), ({"momentum": 0.0}, 0), ({"optimizer": "adamw"}, 2)])
def test_the_state_that_an_optimizer_will_take_is_known_before_its_first_step(changes, copies):
    detector, adapter = modules()
    optimizer = build_optimizer([detector, adapter], ScheduleConfig(**changes))
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    assert state_bytes(optimizer) == copies * sum(4 * one.numel() for one in parameters)
    for one in parameters:
        one.grad = torch.ones_like(one)
    optimizer.step()
    if copies:
        assert state_bytes(optimizer) == 0
        taken = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        assert sum(4 * value.numel() for value in taken) == copies * sum(4 * one.numel() for one in parameters)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("norms", [True, False])
def test_a_state_of_one_group_for_all_is_restored(name, norms):
    """As training checkpoints of format version 2 have it."""
    optimizers = []
    for _ in range(2):
        torch.manual_seed(0)
        detector, adapter = modules()
        schedule = ScheduleConfig(optimizer=name, weight_decay=0.1, norm_weight_decay=norms)
        optimizers.append(build_optimizer([detector, adapter], schedule))
    (one, other), parameters = optimizers, []
    for optimizer in optimizers:
        parameters.append([each for group in optimizer.param_groups for each in group["params"]])
    for step in range(3):
        for number, each in enumerate(parameters[0]):
            each.grad = torch.full_like(each, 0.1 * (number + step))
        one.step()
    whole = copy.deepcopy(one.state_dict())
    indices = [index for group in whole["param_groups"] for index in group["params"]]
    joint = {**whole["param_groups"][0], "params": indices, "fused": True}
    for target, source in zip(parameters[1], parameters[0], strict=True):
        target.data.copy_(source)
    restore(other, {"state": whole["state"], "param_groups": [joint]})
    assert [group["weight_decay"] for group in other.param_groups] == [
        group["weight_decay"] for group in one.param_groups
    ]
    assert not any(group["fused"] for group in other.param_groups)
    for optimizer, its in zip(optimizers, parameters, strict=True):
        for each in its:
            each.grad = torch.ones_like(each)
        optimizer.step()
    assert all(map(torch.equal, *parameters))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"epochs": 4, "decay_epochs": (4,)}, "decay_epochs: it must be below epochs, which is 4"),
        ({"decay": "cosine", "decay_epochs": (2,)}, "it belongs to decay: step"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"optimizer": "lion"}, "'sgd' or 'adamw'"),
    ],
)
def test_wrong_values_are_named(values, expected):
    with pytest.raises(ValueError, match=expected):
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
