"""FitNet: the student's neck, brought to the teacher's channels, imitates the teacher's everywhere alike.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550; on the levels of a detector's neck.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from worker.config import Config
from worker.detectors.base import Detector, TrainPass
from worker.detectors.precision import widened
from worker.methods.base import Clock, NeckMethod, TeacherPass, pointwise


class FitNetConfig(Config):
    """FitNet's parameters. The adapters are 1x1 convolutions, as reproductions on detectors have them."""

    method: Literal["fitnet"] = "fitnet"
    neck_weight: Annotated[float, Field(description="Weight of the loss.", ge=0, le=1e6)] = 1.0


def fitnet_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean over levels of the mean over all values of (student - teacher)^2.

    Args:
        student: adapted features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
    """
    levels = [(widened(ours) - theirs.detach()).square().mean() for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(levels).mean()


class FitNet(NeckMethod):
    """The loss and its adapters. Raises as `NeckMethod`."""

    def __init__(self, config: FitNetConfig, student: Detector, teacher: Detector | None) -> None:
        super().__init__("fitnet", student, teacher, pointwise)
        self.config = config

    def losses(self, student: TrainPass, teacher: TeacherPass, clock: Clock) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck`."""
        ours, theirs = self.maps(student, teacher)
        return {"neck": self.config.neck_weight * fitnet_loss(ours, theirs)}
