"""What a distillation method is: a module that turns one training pass of the student into further losses."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from worker.detectors.base import Detector, TrainPass


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Where training is: `step` counts optimiser steps from 0, `epoch` from 0, out of `steps` and `epochs`."""

    step: int
    steps: int
    epoch: int
    epochs: int


class Method(nn.Module):
    """Base of all methods. Its parameters (adapters) are trained with the student and never leave the run.

    A method is built before a teacher that the run trains itself is trained: read the teacher's weights in `forward`.
    """

    def forward(self, student: TrainPass, teacher: Detector | None, clock: Clock) -> dict[str, Tensor]:
        """Return the weighted losses to be added to the student's own, by name; empty if there are none."""
        raise NotImplementedError


def pair_levels(student_strides: Sequence[int], teacher_strides: Sequence[int]) -> list[tuple[int, int]]:
    """Pair pyramid levels of equal stride: (student's index, teacher's index), finest first.

    Levels that share a stride inside one pyramid are paired in order.
    """
    open_levels: dict[int, list[int]] = defaultdict(list)
    for index, stride in enumerate(teacher_strides):
        open_levels[stride].append(index)
    return [(index, open_levels[stride].pop(0)) for index, stride in enumerate(student_strides) if open_levels[stride]]
