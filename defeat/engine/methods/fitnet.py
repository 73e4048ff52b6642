"""FitNet: the student's neck, brought to the teacher's channels, imitates the teacher's everywhere alike.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550; on the levels of a detector's neck.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.detectors.precision import widened
from defeat.engine.methods.base import NeckMethod, StepInfo, TeacherPass, image_cells, pointwise
from defeat.engine.methods.entry import Entry, weighs
from defeat.engine.methods.losses import mean_over_ranks


class FitNetConfig(Config):
    """FitNet's parameters. The adapters are 1x1 convolutions, as reproductions on detectors have them."""

    method: Literal["fitnet"] = "fitnet"
    neck_weight: Annotated[
        float, Field(description="Weight of the loss.", ge=0, le=1e6, json_schema_extra=weighs("neck"))
    ] = 1.0


def fitnet_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], inside: Sequence[Tensor]) -> Tensor:
    """Return the mean over levels of the mean of (student - teacher)^2 over all channels of the images' cells.

    Where several processes train together the number of cells is the mean over them, see `mean_over_ranks`.

    Args:
        student: adapted features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
        inside: (B, H, W) bool of each level, which cells are no padding; some of each level are not.
    """
    counts, _ = mean_over_ranks(torch.stack([cells.sum() for cells in inside]))
    levels = []
    for ours, theirs, cells, count in zip(student, teacher, inside, counts, strict=True):
        squares = torch.where(cells[:, None], (widened(ours) - theirs.detach()).square(), 0.0)
        levels.append(squares.sum() / (ours.shape[1] * count).to(squares.dtype))
    return torch.stack(levels).mean()


class FitNet(NeckMethod):
    """The loss and its adapters. The padding of a batch is left out. Raises as `NeckMethod`."""

    def __init__(self, config: FitNetConfig, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher, pointwise)
        self.config = config

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck`."""
        ours, theirs = self.maps(student, teacher)
        inside = image_cells(student, ours, self.strides)
        return {"neck": self.config.neck_weight * fitnet_loss(ours, theirs, inside)}


METHOD = Entry(
    summary="Squared differences of the whole neck, every cell alike (Romero et al., ICLR 2015).",
    config=FitNetConfig,
    build=FitNet,
    needs=("neck",),
)
