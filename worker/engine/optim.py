"""Optimisers, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from worker.engine.config import ScheduleConfig


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
    """Return the learning rate of optimiser step `step` (from 0): linear warm-up, then steps or a cosine.

    A function of the step alone, so that a resumed run needs nothing restored.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.decay == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * step / (schedule.epochs * steps_per_epoch)))
    else:
        decay = 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in schedule.decay_epochs)
    return schedule.learning_rate * warmup * decay
