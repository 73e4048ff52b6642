"""PKD: maximises the correlation of the student's neck with the teacher's, channel by channel.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, arXiv 2207.02039.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.detectors.precision import widened
from defeat.engine.methods.base import NeckMethod, StepInfo, TeacherPass, paper_value, unadapted
from defeat.engine.methods.entry import Entry, weighs
from defeat.engine.methods.losses import mean_over_ranks
from defeat.engine.report import RunError

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
            json_schema_extra=weighs("neck"),
        ),
    ] = None


def pkd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of half the mean of (z(student) - z(teacher))^2.

    z subtracts each channel's mean over images and cells and divides by its (population) standard deviation: a
    level's loss is then 1 - r, r the mean over channels of the correlation of student and teacher. It is made from
    sums over the cells alone, so that several processes that train together have the loss of all their images, each
    the same value, see `mean_over_ranks`.

    Args:
        student: features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
    """
    sums = [_sums(widened(ours), widened(theirs.detach())) for ours, theirs in zip(student, teacher, strict=True)]
    # Filled on the device: a tensor made of a list would be copied there, and the CPU would wait.
    cells = [sums[0].new_full((1,), one.numel() // one.shape[1]) for one in student]
    # One exchange for all of them: each waits for the slowest process.
    means, _ = mean_over_ranks(torch.cat([*cells, *(one.flatten() for one in sums)]))
    counts, *rest = means.split([len(sums), *(one.numel() for one in sums)])
    levels = [_half_distance(one.view(5, -1) / count) for one, count in zip(rest, counts, strict=True)]
    return torch.stack(levels).sum().to(torch.promote_types(student[0].dtype, torch.float32))


def _sums(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sums over images and cells of s, t, s^2, t^2 and s t, (5, C) float64, of maps (B, C, H, W)."""
    count = student.numel() // student.shape[1]
    # From the moments about the mean: a mean that is large beside the deviation would cost the squares their digits.
    (varies, mean), (others_vary, others_mean) = (
        torch.var_mean(one, dim=(0, 2, 3), correction=0) for one in (student, teacher)
    )
    # Where it is centred does not change the covariance, so no gradient is lost with the mean's.
    ours, theirs = student - mean.detach()[:, None, None], teacher - others_mean[:, None, None]
    together = (ours * theirs).mean(dim=(0, 2, 3))
    mean, others_mean, *moments = (one.double() for one in (mean, others_mean, varies, others_vary, together))
    squares = (mean.square(), others_mean.square(), mean * others_mean)
    return count * torch.stack([mean, others_mean, *map(torch.add, moments, squares)])


def _half_distance(means: Tensor) -> Tensor:
    """Return half the mean of (z(s) - z(t))^2 over all channels, from the means of s, t, s^2, t^2 and s t, (5, C)."""
    mean, others_mean, square, others_square, product = means
    deviation, others_deviation = _root(square - mean.square()), _root(others_square - others_mean.square())
    covariance = product - mean * others_mean
    width, others_width = deviation + EPSILON, others_deviation + EPSILON
    squares = (deviation / width).square() + (others_deviation / others_width).square()
    return (squares / 2 - covariance / (width * others_width)).mean()


def _root(variance: Tensor) -> Tensor:
    # The root of a constant channel's variance has no gradient, and rounding may bring it below 0.
    varies = variance > 0
    return torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)


class PKD(NeckMethod):
    """The loss over the four finest paired levels.

    The padding of a batch takes part as the authors have it: means and deviations are those of whole maps.

    Raises:
        RunError: `channels_differ` if the two pyramids have unlike channels; else as `NeckMethod`.
    """

    def __init__(self, config: PKDConfig, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher, unadapted)
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

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck`."""
        ours, theirs = self.maps(student, teacher)
        return {"neck": self.weight * pkd_loss(ours[:LEVELS], theirs[:LEVELS])}


METHOD = Entry(
    summary="The correlation of the necks, channel by channel; for pyramids of equally many channels "
    "(Cao et al., NeurIPS 2022).",
    config=PKDConfig,
    build=PKD,
    needs=("neck", "equal_channels"),
)
