"""FRS: imitates the neck and the dense head's scores where the teacher sees something, annotated or not.

Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021, arXiv 2111.00674. Normalisation, weights,
adapters and warm-up as in the authors' code.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.detectors.precision import widened
from defeat.engine.methods.base import NeckMethod, StepInfo, TeacherPass, paper_value, unadapted
from defeat.engine.methods.entry import Entry, weighs
from defeat.engine.methods.losses import mean_over_ranks
from defeat.engine.methods.strength import strength
from defeat.engine.report import RunError

Weight = Annotated[float | None, Field(ge=0, le=1e6)]


class FRSConfig(Config):
    """FRS's parameters. A weight of null is the authors'; the adapters are 3x3 convolutions.

    The scores of a two-stage detector are its proposal network's. The logits part compares them cell by cell and anchor
    by anchor: where student and teacher do not have the same, logits_weight must be 0.
    """

    method: Literal["frs"] = "frs"
    neck_weight: Annotated[
        Weight,
        Field(
            description="Weight of the neck's loss; null: 0.002 two-stage, 0.005 one-stage.",
            json_schema_extra=weighs("neck"),
        ),
    ] = None
    logits_weight: Annotated[
        Weight,
        Field(
            description="Weight of the cells' class logits; null: 0.1 two-stage, 0.02 one-stage.",
            json_schema_extra=weighs("logits"),
        ),
    ] = None
    warmup_steps: Annotated[
        int,
        Field(description="Optimiser steps over which the weights rise linearly from 0; 0: none.", ge=0, le=1_000_000),
    ] = 500


def richness(logits: Tensor) -> Tensor:
    """Return the feature-richness score of each cell, 0 to 1: the largest sigmoid of its class logits (section 3.1).

    Args:
        logits: the teacher's, (B, A, K, H, W).

    Returns:
        (B, H, W), without a gradient.
    """
    return widened(logits.detach()).amax(dim=(1, 2)).sigmoid()


def frs_neck_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of `sum(M * (student - teacher)^2) / sum(M)`, channels in the first sum alone.

    Where several processes train together sum(M) is the mean over them, see `mean_over_ranks`.

    Args:
        student: adapted features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
        scores: M of each level, (B, H, W), see `richness`.
    """
    differences = [
        (widened(ours) - theirs.detach()).square().sum(dim=1) for ours, theirs in zip(student, teacher, strict=True)
    ]
    return _sum_of_means(differences, scores)


def frs_logit_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of `sum(M * BCE(sigmoid(student), sigmoid(teacher))) / sum(M)`, likewise.

    Args:
        student: class logits of each level, (B, A, K, H, W).
        teacher: the teacher's of each level, same shapes; no gradient flows into them.
        scores: M of each level, (B, H, W), see `richness`.
    """
    entropies = []
    for ours, theirs in zip(student, teacher, strict=True):
        targets = widened(theirs.detach()).sigmoid()
        entropy = F.binary_cross_entropy_with_logits(widened(ours), targets, reduction="none")
        entropies.append(entropy.sum(dim=(1, 2)))
    return _sum_of_means(entropies, scores)


def _sum_of_means(values: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of the values' mean, weighted by the scores; both are (B, H, W)."""
    # A teacher that is sure of nothing anywhere gives the mean of all cells, and not 0 / 0.
    weights = [score.clamp(min=torch.finfo(score.dtype).tiny) for score in scores]
    totals, _ = mean_over_ranks(torch.stack([weight.sum() for weight in weights]))
    sums = torch.stack([(value * weight).sum() for value, weight in zip(values, weights, strict=True)])
    return (sums / totals.to(sums.dtype)).sum()


class FRS(NeckMethod):
    """The losses and adapters.

    The padding of a batch takes part as the authors have it: the teacher's own scores weigh it, and are low there.

    Raises:
        RunError: `logits_missing` if the teacher scores no cells; `logits_do_not_pair` if logits_weight is not 0 and
            the two dense heads do not score alike: unlike classes, or unlike anchors on a paired level; else as
            `NeckMethod`.
    """

    def __init__(self, config: FRSConfig, student: Detector, teacher: Detector) -> None:
        neck_weight = paper_value(config.neck_weight, student, two_stage=0.002, one_stage=0.005)
        super().__init__(student, teacher, _adapter if neck_weight > 0 else unadapted)
        self.neck_weight = neck_weight
        self.logits_weight = paper_value(config.logits_weight, student, two_stage=0.1, one_stage=0.02)
        self.warmup_steps = config.warmup_steps
        _require_logits(self.logits_weight, student, teacher, self.pairs)

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:
        """See `Method.losses`: `neck`, `logits`; what has a weight."""
        theirs = [teacher.cell_logits[index] for _, index in self.pairs]
        scores = [richness(level) for level in theirs]
        factor = strength(step_info, warmup_steps=self.warmup_steps, decay="constant")
        losses = {}
        if self.neck_weight > 0:
            losses["neck"] = factor * self.neck_weight * frs_neck_loss(*self.maps(student, teacher), scores)
        if self.logits_weight > 0:
            assert student.cell_logits is not None
            ours = [student.cell_logits[index] for index, _ in self.pairs]
            losses["logits"] = factor * self.logits_weight * frs_logit_loss(ours, theirs, scores)
        return losses


def _adapter(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=3, padding=1)


def _anchors(detector: Detector, level: int) -> str:
    """Describe a level's anchors, equal ones equally; FCOS has points, and sizes of the objects that they learn."""
    (generator,) = (module for module in detector.modules() if isinstance(module, AnchorGenerator))
    sizes = ", ".join(map(str, generator.sizes[level]))
    if "anchors" not in detector.provides:
        return f"points for {sizes} px"
    ratios = ", ".join(f"{float(ratio):g}" for ratio in generator.aspect_ratios[level])
    return f"anchors of {sizes} px in ratios {ratios}"


def _require_logits(
    logits_weight: float, student: Detector, teacher: Detector, pairs: Sequence[tuple[int, int]]
) -> None:
    if "logits" not in teacher.provides:
        raise RunError(
            "user",
            "logits_missing",
            "frs masks the neck by what the teacher's dense head scores in each cell, and this teacher's family has no "
            "such scores: take another teacher, or another method",
        )
    if logits_weight == 0:
        return
    alike = student.head_kind == teacher.head_kind and "logits" in student.provides
    if not alike or student.scores_per_cell != teacher.scores_per_cell:
        ours = student.scores_per_cell if "logits" in student.provides else "none"
        raise RunError(
            "user",
            "logits_do_not_pair",
            f"the logits part compares what dense heads score in a cell (anchors, classes): the {student.head_kind} "
            f"student's {ours}, the {teacher.head_kind} teacher's {teacher.scores_per_cell}; set logits_weight to 0",
        )
    for mine, other in pairs:
        if (anchors := _anchors(student, mine)) != (theirs := _anchors(teacher, other)):
            raise RunError(
                "user",
                "logits_do_not_pair",
                "the logits part compares anchor by anchor, and unlike anchors score unlike things: at stride "
                f"{student.strides[mine]} the student has {anchors}, the teacher {theirs}; give the student the "
                "teacher's anchors, or set logits_weight to 0",
            )


METHOD = Entry(
    summary="The neck and the class logits of its cells, where the teacher sees something (Du et al., NeurIPS 2021).",
    config=FRSConfig,
    build=FRS,
    needs=("neck", "teacher.logits"),
)
