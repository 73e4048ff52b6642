"""DeFeat: objects and background of the neck, positives and negatives of the head, each with its own weight.

Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from worker.config import Config
from worker.detectors.base import Detector, TrainPass
from worker.methods.base import Clock, Method, pair_levels
from worker.methods.losses import decoupled_feature_loss, decoupled_logit_loss
from worker.methods.masks import MaskMode, object_masks
from worker.report import RunError

Weight = Annotated[float, Field(ge=0, le=1e6)]
Temperature = Annotated[float, Field(gt=0, le=100)]


class DefeatConfig(Config):
    """DeFeat's parameters. The defaults are the paper's for COCO; a weight of 0 switches its part off.

    The head part compares class logits of proposals: where student or teacher is a one-stage detector, which has none,
    both head weights must be 0.
    """

    method: Literal["defeat"] = "defeat"
    neck_object_weight: Annotated[Weight, Field(description="Weight of the neck's object cells.")] = 4.0
    neck_background_weight: Annotated[Weight, Field(description="Weight of the neck's background cells.")] = 16.0
    head_object_weight: Annotated[Weight, Field(description="Weight of positive proposals.")] = 2.0
    head_background_weight: Annotated[Weight, Field(description="Weight of negative proposals.")] = 2.0
    head_object_temperature: Annotated[Temperature, Field(description="Temperature of positive proposals.")] = 1.0
    head_background_temperature: Annotated[Temperature, Field(description="Temperature of negative proposals.")] = 1.0
    proposals: Annotated[
        Literal["student"], Field(description="Whose sampled proposals both heads score: the student's own.")
    ] = "student"
    mask: Annotated[
        MaskMode,
        Field(
            description="Cells of a box: `paper` truncates as the authors' code does, `cover` takes each touched one."
        ),
    ] = "paper"
    mask_base_size: Annotated[
        float, Field(description="Box size, px, whose double is the first to leave the finest level.", gt=0, le=4096)
    ] = 56.0
    warmup_steps: Annotated[
        int, Field(description="Steps over which the weights rise linearly from 0; 0: at once.", ge=0, le=1_000_000)
    ] = 0

    @property
    def uses_neck(self) -> bool:
        """Whether any neck part has a weight."""
        return self.neck_object_weight > 0 or self.neck_background_weight > 0

    @property
    def uses_head(self) -> bool:
        """Whether any head part has a weight."""
        return self.head_object_weight > 0 or self.head_background_weight > 0


def _require_heads(config: DefeatConfig, student: Detector, teacher: Detector | None) -> None:
    """Raise `RunError` if the head part is asked for and a detector has no proposals to compare."""
    detectors = {"student": student, "teacher": teacher}
    without = [who for who, detector in detectors.items() if detector and detector.head_kind != "two_stage"]
    if config.uses_head and without:
        raise RunError(
            "user",
            "head_does_not_pair",
            "the head part compares proposals, and a one-stage detector, as this job's "
            f"{' and '.join(without)}, has none: set head_object_weight and head_background_weight to 0",
        )


class Adapter(nn.Conv2d):
    """One level's adapter: 3x3, student's channels to teacher's, weights near zero as the authors' code starts them."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, kernel_size=3, padding=1)
        with torch.no_grad():
            self.weight.normal_().fmod_(2).mul_(1e-4)


class Defeat(Method):
    """The method's losses and adapters. Levels are paired by stride.

    Raises:
        RunError: `teacher_missing`; `pyramids_do_not_pair` if the two pyramids share no stride; `head_does_not_pair` if
            a head weight is above 0 and one of the two detectors is a one-stage detector.
    """

    def __init__(self, config: DefeatConfig, student: Detector, teacher: Detector | None) -> None:
        super().__init__()
        if teacher is None:
            raise RunError("user", "teacher_missing", "the method defeat needs a teacher")
        self.config = config
        self.pairs = pair_levels(student.strides, teacher.strides)
        self.strides = [student.strides[ours] for ours, _ in self.pairs]
        if not self.pairs:
            raise RunError(
                "user",
                "pyramids_do_not_pair",
                f"the student's pyramid has strides {list(student.strides)}, the teacher's {list(teacher.strides)}: "
                "none in common",
            )
        _require_heads(config, student, teacher)
        self.adapters = nn.ModuleList(
            Adapter(student.channels, teacher.channels) for _ in self.pairs if config.uses_neck
        )

    def forward(self, student: TrainPass, teacher: Detector | None, clock: Clock) -> dict[str, Tensor]:
        """See `Method.forward`: `neck_object`, `neck_background`, `head_object`, `head_background`."""
        assert teacher is not None
        with torch.no_grad():
            teacher_features = teacher.trunk(student.images)
        losses: dict[str, Tensor] = {}
        if self.config.uses_neck:
            losses |= self._neck(student, list(teacher_features.values()))
        if self.config.uses_head:
            losses |= self._head(student, teacher, teacher_features)
        warmup = self.config.warmup_steps
        factor = min(1.0, (clock.step + 1) / warmup) if warmup else 1.0
        return {name: factor * loss for name, loss in losses.items()}

    def _neck(self, student: TrainPass, teacher_features: list[Tensor]) -> dict[str, Tensor]:
        student_features = list(student.features.values())
        ours = [adapter(student_features[i]) for adapter, (i, _) in zip(self.adapters, self.pairs, strict=True)]
        masks = object_masks(
            [target["boxes"] for target in student.targets],
            sizes=[(features.shape[-2], features.shape[-1]) for features in ours],
            strides=self.strides,
            mode=self.config.mask,
            base_size=self.config.mask_base_size,
        )
        objects, background = decoupled_feature_loss(ours, [teacher_features[j] for _, j in self.pairs], masks)
        return {
            "neck_object": self.config.neck_object_weight * objects,
            "neck_background": self.config.neck_background_weight * background,
        }

    def _head(self, student: TrainPass, teacher: Detector, teacher_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert student.proposals is not None
        assert student.labels is not None
        assert student.class_logits is not None
        with torch.no_grad():
            theirs = teacher.score(teacher_features, student.proposals, student.image_sizes)
        objects, background = decoupled_logit_loss(
            student.class_logits,
            theirs,
            torch.cat(student.labels),
            object_temperature=self.config.head_object_temperature,
            background_temperature=self.config.head_background_temperature,
        )
        return {
            "head_object": self.config.head_object_weight * objects,
            "head_background": self.config.head_background_weight * background,
        }
