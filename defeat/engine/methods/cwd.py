"""CWD: where in the image each of the teacher's channels looks, as a distribution that the student's imitates.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.detectors.precision import widened
from defeat.engine.methods.base import NeckMethod, StepInfo, TeacherPass, pointwise_if_needed
from defeat.engine.methods.entry import Entry, weighs


class CWDConfig(Config):
    """CWD's parameters. The adapters are 1x1 convolutions, and none where the channels are equal."""

    method: Literal["cwd"] = "cwd"
    neck_weight: Annotated[
        float, Field(description="Weight of the loss of each level.", ge=0, le=1e6, json_schema_extra=weighs("neck"))
    ] = 10.0
    temperature: Annotated[float, Field(description="Temperature of the softmax over cells.", gt=0, le=100)] = 1.0


def cwd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, temperature: float) -> Tensor:
    """Return the sum over levels of `T^2 / (B C) * sum over images and channels of KL(teacher || student)`.

    Each distribution is a softmax over the cells of one channel of one image, of features / T.

    Args:
        student: adapted features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
        temperature: T, above 0.
    """
    levels = []
    for ours, theirs in zip(student, teacher, strict=True):
        batch, channels = ours.shape[:2]
        ours_log = F.log_softmax(widened(ours).flatten(2) / temperature, dim=2)
        theirs_log = F.log_softmax(widened(theirs.detach()).flatten(2) / temperature, dim=2)
        divergence = F.kl_div(ours_log, theirs_log, reduction="sum", log_target=True)
        levels.append(temperature**2 * divergence / (batch * channels))
    return torch.stack(levels).sum()


class CWD(NeckMethod):
    """The loss and its adapters. Raises as `NeckMethod`.

    The padding of a batch takes part, as in the authors' code: the two distributions must cover the same cells, and the
    teacher's own pass over the padding weighs it.
    """

    def __init__(self, config: CWDConfig, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher, pointwise_if_needed)
        self.config = config

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck`."""
        ours, theirs = self.maps(student, teacher)
        return {"neck": self.config.neck_weight * cwd_loss(ours, theirs, temperature=self.config.temperature)}


METHOD = Entry(
    summary="Each channel of the neck as a distribution over its cells (Shu et al., ICCV 2021).",
    config=CWDConfig,
    build=CWD,
    needs=("neck",),
)
