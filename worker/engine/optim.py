"""Optimisers, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from worker.engine.config import ScheduleConfig

# Smith and Topin, "Super-Convergence", 2018, with the values that torch's `OneCycleLR` takes.
ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 25.0
ONE_CYCLE_END = 1e4


def build_optimizer(parameters: Iterable[nn.Parameter], schedule: ScheduleConfig) -> Optimizer:
    """Return the schedule's optimiser over the parameters that want gradients."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(
            trainable,
            lr=schedule.learning_rate,
            betas=(schedule.momentum, 0.999),
            weight_decay=schedule.weight_decay,
        )
    return torch.optim.SGD(
        trainable, lr=schedule.learning_rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )


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
    """Return the factor of the highest learning rate, as torch's `OneCycleLR` with its defaults."""
    top = ONE_CYCLE_RISE * steps - 1
    if step <= top:
        return _half_cosine(1 / ONE_CYCLE_START, 1.0, step / top if top > 0 else 1.0)
    return _half_cosine(1.0, 1 / ONE_CYCLE_START / ONE_CYCLE_END, (step - top) / (steps - 1 - top))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
