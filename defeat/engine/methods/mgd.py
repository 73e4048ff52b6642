"""MGD: generates the teacher's neck from the student's with most cells masked.

Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.detectors.precision import widened
from defeat.engine.methods.base import NeckMethod, StepInfo, TeacherPass, paper_value, pointwise_if_needed
from defeat.engine.methods.entry import Entry, weighs


class MGDConfig(Config):
    """MGD's parameters. The adapters are 1x1 convolutions, and none where the channels are equal."""

    method: Literal["mgd"] = "mgd"
    neck_weight: Annotated[
        float | None,
        Field(
            description="Weight of the loss (alpha); null: the authors', 5e-7 for a two-stage student, 2e-5 for a "
            "one-stage one.",
            ge=0,
            le=1e6,
            json_schema_extra=weighs("neck"),
        ),
    ] = None
    masked_fraction: Annotated[
        float | None,
        Field(
            description="Fraction of cells that are masked (lambda); null: the authors', 0.45 for a two-stage student, "
            "0.65 for a one-stage one.",
            ge=0,
            lt=1,
        ),
    ] = None


def mgd_loss(generated: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of `sum over all values of (generated - teacher)^2 / B`.

    Args:
        generated: what was generated for each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
    """
    levels = [
        (widened(ours) - theirs.detach()).square().sum() / len(ours)
        for ours, theirs in zip(generated, teacher, strict=True)
    ]
    return torch.stack(levels).sum()


class Generation(nn.Sequential):
    """One level's generator: 3x3 convolution, ReLU, 3x3 convolution, all with the teacher's channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )


def blank(features: Tensor, *, masked_fraction: float) -> Tensor:
    """Return features (B, C, H, W) with each cell set to 0 in all channels at this probability.

    Draws from the global generator, after the student's pass: without a trace in its own losses of the same step.
    """
    batch, _, height, width = features.shape
    kept = torch.rand(batch, 1, height, width, device=features.device) >= masked_fraction
    return features * kept


class MGD(NeckMethod):
    """The loss, its adapters and generators. Raises as `NeckMethod`.

    The padding of a batch takes part as the authors have it: the loss is a sum over cells, and their weight is for that
    sum.
    """

    def __init__(self, config: MGDConfig, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher, pointwise_if_needed)
        self.weight = paper_value(config.neck_weight, student, two_stage=5e-7, one_stage=2e-5)
        self.masked_fraction = paper_value(config.masked_fraction, student, two_stage=0.45, one_stage=0.65)
        self.generations = nn.ModuleList(Generation(teacher.channels[theirs]) for _, theirs in self.pairs)

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck`."""
        ours, theirs = self.maps(student, teacher)
        generated = [
            generation(blank(features, masked_fraction=self.masked_fraction))
            for generation, features in zip(self.generations, ours, strict=True)
        ]
        return {"neck": self.weight * mgd_loss(generated, theirs)}


METHOD = Entry(
    summary="Generates the teacher's neck from the student's with most cells masked (Yang et al., ECCV 2022).",
    config=MGDConfig,
    build=MGD,
    needs=("neck",),
)
