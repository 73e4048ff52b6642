"""The interface of a distillation method: a module that adds losses to a training pass of the student."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from defeat.engine.detectors.base import Detector, Maps, TrainPass
from defeat.engine.detectors.normalization import renormalize
from defeat.engine.methods.masks import cells_inside
from defeat.engine.report import RunError


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """Position in training: `step` counts optimiser steps from 0, `epoch` from 0, out of `steps` and `epochs`."""

    step: int
    steps: int
    epoch: int
    epochs: int


class TeacherPass:
    """The frozen teacher on the student's batch, with the teacher's own normalisation and without gradients.

    Each part is computed once, at its first use. Combined methods share it: the teacher's backbone and neck run once a
    step.
    """

    def __init__(self, teacher: Detector, student: TrainPass) -> None:
        self._teacher = teacher
        self._student = student

    @cached_property
    def _maps(self) -> Maps:
        with torch.no_grad():
            student = self._student
            images = renormalize(
                student.images, student.image_sizes, given=student.normalization, wanted=self._teacher.normalization
            )
            return self._teacher.maps(images)

    @property
    def features(self) -> Mapping[str, Tensor]:
        """The pyramid's maps by level name, finest first."""
        return self._maps.features

    @property
    def backbone(self) -> Mapping[int, Tensor]:
        """The backbone's maps by stride; only of a teacher that provides "backbone"."""
        assert self._maps.backbone is not None
        return self._maps.backbone

    @cached_property
    def cell_logits(self) -> list[Tensor]:
        """Class logits of its dense head in each cell, see `Detector.cell_logits`; if it provides "logits"."""
        with torch.no_grad():
            return self._teacher.cell_logits(self.features)

    @cached_property
    def samples(self) -> tuple[list[Tensor], list[Tensor]]:
        """Its own sampled proposals and their labels, see `Detector.sample_proposals`; two-stage teachers only."""
        student = self._student
        with torch.no_grad():
            return self._teacher.sample_proposals(self.features, student.images, student.image_sizes, student.targets)

    @torch.no_grad()
    def score_proposals(self, proposals: list[Tensor]) -> Tensor:
        """Class logits of proposals, see `Detector.score_proposals`; two-stage teachers only."""
        return self._teacher.score_proposals(self.features, proposals, self._student.image_sizes)


class Method(nn.Module):
    """Base of all methods. Its parameters (adapters) are trained with the student and never leave the run.

    A method is built before a teacher that the run trains itself is trained: read the teacher's weights in `losses`.

    Attributes:
        warmup_steps: optimiser steps over which its losses rise from 0.
        compares_backbones: whether one of its losses compares maps of the backbones.
    """

    warmup_steps: int = 0
    compares_backbones: bool = False

    def forward(self, student: TrainPass, teacher: Detector | None, step_info: StepInfo) -> dict[str, Tensor]:
        """Return the weighted losses to be added to the student's own, by name; empty if there are none."""
        assert teacher is not None, "a method that needs no teacher overrides `forward`"
        return self.losses(student, TeacherPass(teacher, student), step_info)

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:
        """Return the losses of `forward` from a pass of the teacher that other methods may share."""
        raise NotImplementedError


def pair_levels(student_strides: Sequence[int], teacher_strides: Sequence[int]) -> list[tuple[int, int]]:
    """Pair pyramid levels of equal stride: (student's index, teacher's index), finest first.

    Levels that share a stride inside one pyramid are paired in order.
    """
    open_levels: dict[int, list[int]] = defaultdict(list)
    for index, stride in enumerate(teacher_strides):
        open_levels[stride].append(index)
    return [(index, open_levels[stride].pop(0)) for index, stride in enumerate(student_strides) if open_levels[stride]]


def unadapted(student_channels: int, teacher_channels: int) -> nn.Module:  # noqa: ARG001 - the signature of all adapters
    """Return the identity: for parts that need no adapter, or have a weight of 0."""
    return nn.Identity()


def pointwise(student_channels: int, teacher_channels: int) -> nn.Module:
    """Return a 1x1 convolution from the student's channels to the teacher's, with torch's initial values."""
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


def pointwise_if_needed(student_channels: int, teacher_channels: int) -> nn.Module:
    """Return `pointwise`, or the identity if the channels are equal."""
    make = unadapted if student_channels == teacher_channels else pointwise
    return make(student_channels, teacher_channels)


class NearZero(nn.Conv2d):
    """A 3x3 convolution, student's channels to teacher's, whose weights start near zero: `normal().fmod(2) * 1e-4`.

    The initial values of the adapters in the authors' code of FGFI, and of DeFeat after it.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, kernel_size=3, padding=1)
        with torch.no_grad():
            self.weight.normal_().fmod_(2).mul_(1e-4)


def paper_value(given: float | None, student: Detector, *, two_stage: float, one_stage: float) -> float:
    """Return `given`, or if it is None the value of a method's authors for students with this kind of head."""
    if given is not None:
        return given
    return two_stage if student.head_kind == "two_stage" else one_stage


def _map_shapes(detector: Detector, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return height and width of each of the detector's maps of an image of this size, without computing them."""
    shapes = copy.deepcopy(detector).to("meta").eval()
    maps = shapes.features(torch.zeros(1, 3, *size, device="meta"))
    return [(features.shape[-2], features.shape[-1]) for features in maps.values()]


@torch.no_grad()
def _require_equal_maps(
    student: Detector, teacher: Detector, pairs: Sequence[tuple[int, int]], size: tuple[int, int]
) -> None:
    """Raise `RunError` unless paired maps have the same shape. Some backbones round a map's size up, some down.

    For students that resize to a fixed size: the batches of others are multiples of 32, where all agree.
    """
    ours, theirs = _map_shapes(student, size), _map_shapes(teacher, size)
    for mine, other in pairs:
        if ours[mine] != theirs[other]:
            raise RunError(
                "user",
                "maps_do_not_pair",
                f"of an image of {size[0]} x {size[1]} px the student's map at stride {student.strides[mine]} is "
                f"{ours[mine][0]} x {ours[mine][1]}, the teacher's {theirs[other][0]} x {theirs[other][1]}: give the "
                "student a size that is a multiple of 32, or take a teacher with another backbone",
            )


def image_cells(student: TrainPass, maps: Sequence[Tensor], strides: Sequence[int]) -> list[Tensor]:
    """Return which cells of maps (B, C, H, W) of the student's batch are no padding: (B, H, W) bool of each map.

    Args:
        student: its training pass, for the sizes of its images.
        maps: of the levels, or of the backbone's stages.
        strides: the stride of each map in pixels.
    """
    return cells_inside(
        student.image_sizes,
        padded=(student.images.shape[-2], student.images.shape[-1]),
        sizes=[(one.shape[-2], one.shape[-1]) for one in maps],
        strides=strides,
        device=student.images.device,
    )


class NeckMethod(Method):
    """Base of methods that match the neck: pairs the levels, and brings the student's maps to the teacher's channels.

    Attributes:
        pairs: the paired levels, (student's index, teacher's index), finest first.
        strides: the stride of each pair in pixels.
        adapters: one module for each pair.

    Raises:
        RunError: `pyramids_do_not_pair` if the two pyramids share no stride; `maps_do_not_pair` if the maps of a shared
            stride have unlike shapes at the size that the student resizes every image to.
    """

    def __init__(self, student: Detector, teacher: Detector, adapter: Callable[[int, int], nn.Module]) -> None:
        """Pair the levels, and build the adapters by `adapter(student's channels, teacher's channels)`."""
        super().__init__()
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
        if student.fixed_size is not None:
            _require_equal_maps(student, teacher, self.pairs, student.fixed_size)

    def maps(self, student: TrainPass, teacher: TeacherPass) -> tuple[list[Tensor], list[Tensor]]:
        """Return the paired levels: the student's maps, adapted, and the teacher's; each (B, C, H, W), same shapes."""
        ours, theirs = list(student.features.values()), list(teacher.features.values())
        adapted = [adapter(ours[i]) for adapter, (i, _) in zip(self.adapters, self.pairs, strict=True)]
        return adapted, [theirs[j] for _, j in self.pairs]
