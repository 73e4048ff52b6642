"""What a distillation method is: a module that turns one training pass of the student into further losses."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.detectors.base import Detector, TrainPass
from worker.report import RunError


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


def pointwise(student_channels: int, teacher_channels: int) -> nn.Module:
    """Return a 1x1 convolution from the student's channels to the teacher's, as the framework initialises it."""
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


def pointwise_if_needed(student_channels: int, teacher_channels: int) -> nn.Module:
    """Return `pointwise`, or nothing at all where the channels are equal."""
    return nn.Identity() if student_channels == teacher_channels else pointwise(student_channels, teacher_channels)


def paper_value(given: float | None, student: Detector, *, two_stage: float, one_stage: float) -> float:
    """Return `given`, or where it is None what a method's authors take for students with this kind of head."""
    if given is not None:
        return given
    return two_stage if student.head_kind == "two_stage" else one_stage


class NeckMethod(Method):
    """Base of methods that match the neck: pairs the levels, and brings the student's maps to the teacher's channels.

    Attributes:
        pairs: the paired levels, (student's index, teacher's index), finest first.
        strides: the stride of each pair in pixels.
        adapters: one module for each pair.

    Raises:
        RunError: `teacher_missing`; `pyramids_do_not_pair` if the two pyramids share no stride.
    """

    def __init__(
        self, name: str, student: Detector, teacher: Detector | None, adapter: Callable[[int, int], nn.Module]
    ) -> None:
        """Pair the levels, and build the adapters by `adapter(student's channels, teacher's channels)`."""
        super().__init__()
        if teacher is None:
            raise RunError("user", "teacher_missing", f"the method {name} needs a teacher")
        self.pairs = pair_levels(student.strides, teacher.strides)
        self.strides = [student.strides[ours] for ours, _ in self.pairs]
        if not self.pairs:
            raise RunError(
                "user",
                "pyramids_do_not_pair",
                f"the student's pyramid has strides {list(student.strides)}, the teacher's {list(teacher.strides)}: "
                "none in common",
            )
        self.adapters = nn.ModuleList(
            adapter(student.channels[ours], teacher.channels[theirs]) for ours, theirs in self.pairs
        )

    @torch.no_grad()
    def teacher_features(self, student: TrainPass, teacher: Detector | None) -> Mapping[str, Tensor]:
        """Return the teacher's maps of the very batch that the student saw."""
        assert teacher is not None
        return teacher.trunk(student.images)

    def maps(self, student: TrainPass, teacher_features: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the paired levels: the student's maps, adapted, and the teacher's; each (B, C, H, W), same shapes."""
        ours, theirs = list(student.features.values()), list(teacher_features.values())
        adapted = [adapter(ours[i]) for adapter, (i, _) in zip(self.adapters, self.pairs, strict=True)]
        return adapted, [theirs[j] for _, j in self.pairs]
