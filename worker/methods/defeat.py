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
from worker.methods.base import Clock, NeckMethod
from worker.methods.losses import decoupled_feature_loss, decoupled_logit_loss
from worker.methods.masks import MaskMode, object_masks
from worker.methods.strength import Decay, strength
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
        Literal["student", "teacher", "both"],
        Field(
            description="Whose sampled proposals both heads score: the student's own, the cheapest; the teacher's, as "
            "in the paper; or both, their losses added."
        ),
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
    decay: Annotated[
        Decay,
        Field(
            description="The weights over the epochs e = 0 … E - 1: `constant`; `linear` 1 - e/E; `cosine` "
            "(1 + cos(pi e/E)) / 2; `up_down` min(e + 1, E - e) / ceil(E/2). The warm-up multiplies it."
        ),
    ] = "constant"

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


class Defeat(NeckMethod):
    """The method's losses and adapters. Levels are paired by stride.

    With `proposals` teacher or both, the teacher's sampler draws from the global generator, after the student's pass
    and so without a trace in the student's own losses of the same step.

    Raises:
        RunError: see `NeckMethod`; `head_does_not_pair` if a head weight is above 0 and one of the two detectors is a
            one-stage detector.
    """

    def __init__(self, config: DefeatConfig, student: Detector, teacher: Detector | None) -> None:
        super().__init__("defeat", student, teacher, Adapter if config.uses_neck else lambda *_: nn.Identity())
        self.config = config
        _require_heads(config, student, teacher)

    def forward(self, student: TrainPass, teacher: Detector | None, clock: Clock) -> dict[str, Tensor]:
        """See `Method.forward`: `neck_object`, `neck_background`, `head_object`, `head_background`."""
        assert teacher is not None
        teacher_features = self.teacher_features(student, teacher)
        losses: dict[str, Tensor] = {}
        if self.config.uses_neck:
            losses |= self._neck(student, teacher_features)
        if self.config.uses_head:
            losses |= self._head(student, teacher, teacher_features)
        factor = strength(clock, warmup_steps=self.config.warmup_steps, decay=self.config.decay)
        return {name: factor * loss for name, loss in losses.items()}

    def _neck(self, student: TrainPass, teacher_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours, theirs = self.maps(student, teacher_features)
        masks = object_masks(
            [target["boxes"] for target in student.targets],
            sizes=[(features.shape[-2], features.shape[-1]) for features in ours],
            strides=self.strides,
            mode=self.config.mask,
            base_size=self.config.mask_base_size,
        )
        objects, background = decoupled_feature_loss(ours, theirs, masks)
        return {
            "neck_object": self.config.neck_object_weight * objects,
            "neck_background": self.config.neck_background_weight * background,
        }

    def _head(self, student: TrainPass, teacher: Detector, teacher_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = []
        if self.config.proposals != "teacher":
            assert student.proposals is not None
            assert student.labels is not None
            assert student.class_logits is not None
            parts.append(
                self._logits(
                    student, teacher, teacher_features, student.class_logits, student.proposals, student.labels
                )
            )
        if self.config.proposals != "student":
            assert student.score is not None
            with torch.no_grad():
                proposals, labels = teacher.sample(
                    teacher_features, student.images, student.image_sizes, student.targets
                )
            parts.append(self._logits(student, teacher, teacher_features, student.score(proposals), proposals, labels))
        return {
            "head_object": self.config.head_object_weight * torch.stack([part[0] for part in parts]).sum(),
            "head_background": self.config.head_background_weight * torch.stack([part[1] for part in parts]).sum(),
        }

    def _logits(
        self,
        student: TrainPass,
        teacher: Detector,
        teacher_features: Mapping[str, Tensor],
        class_logits: Tensor,
        proposals: list[Tensor],
        labels: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return both parts of the head loss on one set of proposals with its own labels."""
        with torch.no_grad():
            theirs = teacher.score(teacher_features, proposals, student.image_sizes)
        return decoupled_logit_loss(
            class_logits,
            theirs,
            torch.cat(labels),
            object_temperature=self.config.head_object_temperature,
            background_temperature=self.config.head_background_temperature,
        )
