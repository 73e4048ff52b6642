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
from worker.methods.losses import mean_over_ranks
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
    level's loss is then 1 - r, r the mean over channels of the correlation of student and teacher. Where several
    processes train together mean and deviation are those over the pictures of all, see `mean_over_ranks`.

    Args:
        student: features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
    """
    maps = [widened(one) for ours, theirs in zip(student, teacher, strict=True) for one in (ours, theirs.detach())]
    scores, cells = _z_scores(maps)
    levels = [
        (ours - theirs).square().sum() / (2 * ours.shape[1] * count.to(ours.dtype))
        for ours, theirs, count in zip(scores[::2], scores[1::2], cells[::2], strict=True)
    ]
    return torch.stack(levels).sum()


def _z_scores(maps: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Return z of each of the maps (B, C, H, W), and how many values each channel has, the mean over processes."""
    counts = [one.numel() // one.shape[1] for one in maps]
    # Sums of values and of squares can be added over processes. They are taken from the moments, as is more exact.
    sums = []
    for one, count in zip(maps, counts, strict=True):
        variance, mean = (moment.double() for moment in torch.var_mean(one, dim=(0, 2, 3), correction=0))
        sums += [count * mean, count * (variance + mean.square())]
    whole = torch.tensor(counts, dtype=torch.float64, device=maps[0].device)
    # One exchange for all of them: each waits for the slowest process.
    totals, _ = mean_over_ranks(torch.cat([whole, *sums]))
    cells, *rest = totals.split([len(maps), *(len(one) for one in sums)])
    scores = []
    for one, total, squares, cell in zip(maps, rest[::2], rest[1::2], cells, strict=True):
        mean = total / cell
        variance = squares / cell - mean.square()
        # The root of a constant channel's variance has no gradient, and rounding may bring it below 0.
        varies = variance > 0
        deviation = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)
        centre, width = (moment.to(one.dtype)[:, None, None] for moment in (mean, deviation + EPSILON))
        scores.append((one - centre) / width)
    return scores, cells.unbind()


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
