"""Optimisers, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from defeat.engine.training.config import ScheduleConfig

# Smith and Topin, "Super-Convergence", 2018, with the defaults of torch's `OneCycleLR`.
ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 25.0
ONE_CYCLE_END = 1e4


def build_optimizer(modules: Iterable[nn.Module], schedule: ScheduleConfig) -> Optimizer:
    """Return the schedule's optimiser over the trainable parameters of the modules.

    Each module has one parameter group, or two with `norm_weight_decay` off: that of normalisation parameters and
    biases then has no weight decay. On a GPU the update is fused: one operation for each type of tensor.
    """
    groups = [group for module in modules for group in _groups(module, schedule) if group["params"]]
    fused = all(one.is_cuda for group in groups for one in group["params"])
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(schedule.momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=schedule.momentum, fused=fused)


def _groups(module: nn.Module, schedule: ScheduleConfig) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if schedule.norm_weight_decay:
        return [{"params": trainable, "weight_decay": schedule.weight_decay}]
    # A norm's scale and shift, and a bias, have one dimension; weights have two or more.
    decayed, exempt = ([one for one in trainable if (one.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state dict of an optimiser over the same parameters, with one group or as many as there are now.

    Up to format version 2 of training checkpoints one group held all parameters, in the order in which the groups have
    them now. Whether the update is fused depends on the device, and is not restored.
    """
    saved, groups = state["param_groups"], optimizer.param_groups
    if len(saved) == 1 < len(groups):
        (joint,), rest = saved, iter(saved[0]["params"])
        saved = [
            {**joint, "weight_decay": group["weight_decay"], "params": list(islice(rest, len(group["params"])))}
            for group in groups
        ]
    fused = [group["fused"] for group in groups]
    optimizer.load_state_dict({**state, "param_groups": saved})
    for group, is_fused in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = is_fused


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes that the optimiser's state will take and has not yet taken: it makes it in its first step."""
    copies = 2 if isinstance(optimizer, torch.optim.AdamW) else 1 if optimizer.defaults["momentum"] else 0
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(copies * one.numel() * one.element_size() for one in parameters if one not in optimizer.state)


def learning_rate(schedule: ScheduleConfig, *, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimiser step `step` (from 0): linear warm-up, then steps or a cosine; or one cycle.

    A function of the step alone, so that a resumed run needs nothing restored.
    """
    steps = schedule.epochs * steps_per_epoch
    if schedule.decay == "one_cycle":
        return schedule.learning_rate * _one_cycle(step, steps)
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.decay == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
    else:
        decay = 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in schedule.decay_epochs)
    return schedule.learning_rate * warmup * decay


def _one_cycle(step: int, steps: int) -> float:
    """Return the factor of the peak learning rate, as torch's `OneCycleLR` with its defaults."""
    top = ONE_CYCLE_RISE * steps - 1
    if step <= top:
        return _half_cosine(1 / ONE_CYCLE_START, 1.0, step / top if top > 0 else 1.0)
    return _half_cosine(1.0, 1 / ONE_CYCLE_START / ONE_CYCLE_END, (step - top) / (steps - 1 - top))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
