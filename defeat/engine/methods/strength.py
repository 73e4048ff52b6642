"""Factor of the distillation weights during training: a warm-up over the first steps times a decay by epoch."""

import math
from typing import Literal

from defeat.engine.methods.base import StepInfo

Decay = Literal["constant", "linear", "cosine", "up_down"]


def strength(step_info: StepInfo, *, warmup_steps: int, decay: Decay) -> float:
    """Return the factor of all distillation weights, 0 to 1: warm-up times decay.

    The warm-up is `min(1, (step + 1) / warmup_steps)`, or 1 without steps. The decay, with e the epoch from 0 and E
    their number, is one value for a whole epoch:

    - `constant`: 1;
    - `linear`: 1 - e / E, from 1 down to 1 / E;
    - `cosine`: (1 + cos(pi e / E)) / 2;
    - `up_down`: min(e + 1, E - e) / ceil(E / 2), up to 1 in the middle and down again, the same both ways.

    None of them is 0 in any epoch: such an epoch would run the teacher and learn nothing from it.
    """
    warmup = min(1.0, (step_info.step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * _decay(step_info.epoch, step_info.epochs, decay)


def _decay(epoch: int, epochs: int, decay: Decay) -> float:
    if decay == "linear":
        return 1 - epoch / epochs
    if decay == "cosine":
        return (1 + math.cos(math.pi * epoch / epochs)) / 2
    if decay == "up_down":
        return min(epoch + 1, epochs - epoch) / math.ceil(epochs / 2)
    return 1.0
