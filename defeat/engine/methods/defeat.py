"""DeFeat: objects and background of the neck and the backbone, positives and negatives of the head, weighted apart.

Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.methods.balance import Balance
from defeat.engine.methods.base import NearZero, NeckMethod, StepInfo, TeacherPass, image_cells, unadapted
from defeat.engine.methods.entry import Entry, weighs
from defeat.engine.methods.losses import decoupled_feature_loss, decoupled_logit_loss
from defeat.engine.methods.masks import MaskMode, cell_kinds, object_masks
from defeat.engine.methods.strength import Decay, strength
from defeat.engine.report import RunError

# C3 to C5, and the stride of the mask that they all share, px (the authors' code).
BACKBONE_STRIDES = (8, 16, 32)
BACKBONE_MASK_STRIDE = 4

Weight = Annotated[float, Field(ge=0, le=1e6)]
Temperature = Annotated[float, Field(gt=0, le=100)]


class DefeatConfig(Config):
    """DeFeat's parameters. The defaults are the paper's for COCO; a weight of 0 switches its part off.

    The head part compares class logits of proposals: where student or teacher is a one-stage detector, which has none,
    both head weights must be 0. The backbone part is off unless it is given a weight: the authors name none. It needs
    backbones with a feature pyramid on both sides, which share a stride from 8 to 32.
    """

    method: Literal["defeat"] = "defeat"
    neck_object_weight: Annotated[
        Weight, Field(description="Weight of the neck's object cells.", json_schema_extra=weighs("neck"))
    ] = 4.0
    neck_background_weight: Annotated[
        Weight, Field(description="Weight of the neck's background cells.", json_schema_extra=weighs("neck"))
    ] = 16.0
    backbone_object_weight: Annotated[
        Weight, Field(description="Weight of the backbone's object cells.", json_schema_extra=weighs("backbone"))
    ] = 0.0
    backbone_background_weight: Annotated[
        Weight, Field(description="Weight of the backbone's background cells.", json_schema_extra=weighs("backbone"))
    ] = 0.0
    head_object_weight: Annotated[
        Weight, Field(description="Weight of positive proposals.", json_schema_extra=weighs("proposals"))
    ] = 2.0
    head_background_weight: Annotated[
        Weight, Field(description="Weight of negative proposals.", json_schema_extra=weighs("proposals"))
    ] = 2.0
    weights: Annotated[
        Literal["fixed", "auto"],
        Field(
            description="`fixed`: as given. `auto`: each neck and head part whose weight is not 0 is scaled so that "
            "the norm of its gradient at the student's pyramid is that of the student's own losses, measured every "
            "50 steps; its weight makes no difference. Measured better than `fixed` for Faster R-CNN, worse for "
            "RetinaNet."
        ),
    ] = "fixed"
    head_object_temperature: Annotated[Temperature, Field(description="Temperature of positive proposals.")] = 1.0
    head_background_temperature: Annotated[Temperature, Field(description="Temperature of negative proposals.")] = 1.0
    proposals: Annotated[
        Literal["student", "teacher", "both"],
        Field(
            description="Which sampled proposals both heads score: `student`, its own, the fastest; `teacher`, as in "
            "the paper; `both`, with their losses added. The teacher's are sampled from those that it keeps in "
            "detection (its `test_proposals`) and the ground truth."
        ),
    ] = "student"
    mask: Annotated[
        MaskMode,
        Field(
            description="Cells of a box: `paper` truncates as the authors' code does, `cover` takes every touched cell."
        ),
    ] = "paper"
    mask_base_size: Annotated[
        float,
        Field(description="Half the smallest size of boxes that leave the finest level, px.", gt=0, le=4096),
    ] = 56.0
    warmup_steps: Annotated[
        int,
        Field(description="Optimiser steps over which the weights rise linearly from 0; 0: none.", ge=0, le=1_000_000),
    ] = 0
    decay: Annotated[
        Decay,
        Field(
            description="Factor of the weights at epoch e of E, from 0: `constant`; `linear` 1 - e/E; `cosine` "
            "(1 + cos(pi e/E)) / 2; `up_down` min(e + 1, E - e) / ceil(E/2). Times the warm-up."
        ),
    ] = "constant"

    def parts(self, *of: Literal["neck", "backbone", "head"]) -> list[str]:
        """Return the names of the losses `of` these places that have a weight."""
        names = [f"{place}_{part}" for place in of for part in ("object", "background")]
        return [name for name in names if getattr(self, f"{name}_weight") > 0]


def _require_heads(config: DefeatConfig, student: Detector, teacher: Detector) -> None:
    """Raise `RunError` if the head part has a weight and a detector has no proposals to compare."""
    detectors = {"student": student, "teacher": teacher}
    without = [who for who, detector in detectors.items() if detector.head_kind != "two_stage"]
    if config.parts("head") and without:
        raise RunError(
            "user",
            "head_does_not_pair",
            "the head part compares proposals, and a one-stage detector, as this job's "
            f"{' and '.join(without)}, has none: set head_object_weight and head_background_weight to 0",
        )


def _pair_backbones(config: DefeatConfig, student: Detector, teacher: Detector) -> list[int]:
    """Return the strides of `BACKBONE_STRIDES` that both backbones have; none if that part has no weight.

    Raises:
        RunError: `backbones_do_not_pair` if it has a weight and there are none.
    """
    if not config.parts("backbone"):
        return []
    ours, theirs = student.backbone_channels, teacher.backbone_channels
    if shared := [stride for stride in BACKBONE_STRIDES if stride in ours and stride in theirs]:
        return shared
    raise RunError(
        "user",
        "backbones_do_not_pair",
        f"the backbone part compares maps at strides {list(BACKBONE_STRIDES)}; the student's backbone provides "
        f"{list(ours)}, the teacher's {list(theirs)}: none in common (a family without a feature pyramid provides "
        "none); set backbone_object_weight and backbone_background_weight to 0",
    )


class Defeat(NeckMethod):
    """The method's losses and adapters. Levels are paired by stride.

    The padding of a batch is neither object nor background, on the neck and on the backbone; the authors count it as
    background. So the weight of an image's cells does not depend on the other images of its batch.

    With `proposals` teacher or both, the teacher's sampler draws from the global generator, after the student's pass
    and so without a trace in the student's own losses of the same step.

    Raises:
        RunError: see `NeckMethod`; `head_does_not_pair` if a head weight is above 0 and one of the two detectors is a
            one-stage detector; `backbones_do_not_pair` if a backbone weight is and the backbones share no stride.
    """

    def __init__(self, config: DefeatConfig, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher, NearZero if config.parts("neck") else unadapted)
        self.config = config
        self.warmup_steps = config.warmup_steps
        self.compares_backbones = bool(config.parts("backbone"))
        _require_heads(config, student, teacher)
        self.balance = Balance(config.parts("neck", "head")) if config.weights == "auto" else None
        self.backbone_strides = _pair_backbones(config, student, teacher)
        self.backbone_adapters = nn.ModuleList(
            nn.Sequential(NearZero(student.backbone_channels[stride], teacher.backbone_channels[stride]), nn.ReLU())
            for stride in self.backbone_strides
        )

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:
        """See `Method.losses`: `neck_object`, `neck_background`, of `backbone`, of `head`; what has a weight."""
        losses: dict[str, Tensor] = {}
        if self.config.parts("neck"):
            losses |= self._neck(student, teacher)
        if self.config.parts("backbone"):
            losses |= self._backbone(student, teacher)
        if self.config.parts("head"):
            losses |= self._head(student, teacher)
        if self.balance is not None:
            losses = self.balance(student, losses, step_info.step)
        factor = strength(step_info, warmup_steps=self.warmup_steps, decay=self.config.decay)
        weighed = self.config.parts("neck", "backbone", "head")
        return {name: factor * losses[name] for name in weighed}

    def _masks(self, student: TrainPass, sizes: list[tuple[int, int]], strides: list[int]) -> list[Tensor]:
        return object_masks(
            [target["boxes"] for target in student.targets],
            sizes=sizes,
            strides=strides,
            mode=self.config.mask,
            base_size=self.config.mask_base_size,
        )

    def _neck(self, student: TrainPass, teacher: TeacherPass) -> dict[str, Tensor]:
        ours, theirs = self.maps(student, teacher)
        masks = self._masks(student, [(one.shape[-2], one.shape[-1]) for one in ours], self.strides)
        kinds = cell_kinds(masks, image_cells(student, ours, self.strides))
        objects, background = decoupled_feature_loss(ours, theirs, kinds)
        return {
            "neck_object": self.config.neck_object_weight * objects,
            "neck_background": self.config.neck_background_weight * background,
        }

    def _backbone(self, student: TrainPass, teacher: TeacherPass) -> dict[str, Tensor]:
        """The neck's losses on C3 to C5; every box marks every level, by one mask at stride 4 that is scaled down."""
        assert student.backbone is not None
        ours = [
            adapter(student.backbone[stride])
            for adapter, stride in zip(self.backbone_adapters, self.backbone_strides, strict=True)
        ]
        theirs = [teacher.backbone[stride] for stride in self.backbone_strides]
        finest = (-(-side // BACKBONE_MASK_STRIDE) for side in student.images.shape[-2:])
        (mask,) = self._masks(student, [(next(finest), next(finest))], [BACKBONE_MASK_STRIDE])
        masks = [F.interpolate(mask.byte(), size=one.shape[-2:], mode="nearest").bool() for one in ours]
        kinds = cell_kinds(masks, image_cells(student, ours, self.backbone_strides))
        objects, background = decoupled_feature_loss(ours, theirs, kinds)
        return {
            "backbone_object": self.config.backbone_object_weight * objects,
            "backbone_background": self.config.backbone_background_weight * background,
        }

    def _head(self, student: TrainPass, teacher: TeacherPass) -> dict[str, Tensor]:
        parts = []
        if self.config.proposals != "teacher":
            assert student.proposals is not None
            assert student.labels is not None
            assert student.class_logits is not None
            parts.append(self._logits(teacher, student.class_logits, student.proposals, student.labels))
        if self.config.proposals != "student":
            assert student.score_proposals is not None
            proposals, labels = teacher.samples
            parts.append(self._logits(teacher, student.score_proposals(proposals), proposals, labels))
        return {
            "head_object": self.config.head_object_weight * torch.stack([part[0] for part in parts]).sum(),
            "head_background": self.config.head_background_weight * torch.stack([part[1] for part in parts]).sum(),
        }

    def _logits(
        self, teacher: TeacherPass, class_logits: Tensor, proposals: list[Tensor], labels: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return both parts of the head loss on one set of proposals with its own labels."""
        return decoupled_logit_loss(
            class_logits,
            teacher.score_proposals(proposals),
            torch.cat(labels),
            object_temperature=self.config.head_object_temperature,
            background_temperature=self.config.head_background_temperature,
        )


METHOD = Entry(
    summary="Decoupled features: object and background of the neck and the backbone, positives and negatives of the "
    "head (Guo et al., CVPR 2021).",
    config=DefeatConfig,
    build=Defeat,
    needs=("neck",),
    backbone_strides=BACKBONE_STRIDES,
)
