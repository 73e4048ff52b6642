"""PKD: the student's neck correlates with the teacher's, channel by channel, whatever the scale of either.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, arXiv 2207.02039.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from worker.config import Config
from worker.detectors.base import Detector, TrainPass
from worker.detectors.precision import widened
from worker.methods.base import Clock, NeckMethod, TeacherPass, paper_value
from worker.report import RunError

LEVELS = 4  # The authors leave the levels behind the fourth alone.
EPSILON = 1e-6  # Added to the standard deviation: a channel may be constant.


class PKDConfig(Config):
    """PKD's parameters. It has no adapter: the two pyramids must have equally many channels."""

    method: Literal["pkd"] = "pkd"
    neck_weight: Annotated[
        float | None,
        Field(
            description="Weight of the loss of each level; null: the authors', 6 for a two-stage student, 10 for a "
            "one-stage one.",
            ge=0,
            le=1e6,
        ),
    ] = None


def pkd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of half the mean of (z(student) - z(teacher))^2.

    z subtracts each channel's mean over pictures and cells and divides by its (population) standard deviation: a
    level's loss is then 1 - r, r the mean over channels of the correlation of student and teacher.

    Args:
        student: features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
    """
    levels = [
        (_z_scores(widened(ours)) - _z_scores(widened(theirs.detach()))).square().mean() / 2
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(levels).sum()


def _z_scores(features: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(features, dim=(0, 2, 3), correction=0, keepdim=True)
    return (features - mean) / (deviation + EPSILON)


class PKD(NeckMethod):
    """The loss over the four finest paired levels.

    Raises:
        RunError: `channels_differ` if the two pyramids have unlike channels; else as `NeckMethod`.
    """

    def __init__(self, config: PKDConfig, student: Detector, teacher: Detector | None) -> None:
        super().__init__("pkd", student, teacher, lambda *_: nn.Identity())
        assert teacher is not None
        for ours, theirs in self.pairs:
            if student.channels[ours] != teacher.channels[theirs]:
                raise RunError(
                    "user",
                    "channels_differ",
                    f"at stride {student.strides[ours]} the student's pyramid has {student.channels[ours]} channels, "
                    f"the teacher's {teacher.channels[theirs]}: pkd compares channel by channel and needs equally "
                    "many; give the student as many, or take another method",
                )
        self.weight = paper_value(config.neck_weight, student, two_stage=6.0, one_stage=10.0)

    def losses(self, student: TrainPass, teacher: TeacherPass, clock: Clock) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck`."""
        ours, theirs = self.maps(student, teacher)
        return {"neck": self.weight * pkd_loss(ours[:LEVELS], theirs[:LEVELS])}
