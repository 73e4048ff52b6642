"""FGFI: imitates the neck where anchors lie near objects.

Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.ops import box_iou

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.detectors.precision import widened
from defeat.engine.methods.base import NearZero, NeckMethod, StepInfo, TeacherPass
from defeat.engine.methods.entry import Entry, weighs
from defeat.engine.methods.losses import mean_over_ranks
from defeat.engine.report import RunError


class FGFIConfig(Config):
    """FGFI's parameters. The adapters are 3x3 convolutions whose weights start near zero, as the authors'.

    The ReLU behind the authors' adapter is left out: their features come out of one, a pyramid's do not.
    """

    method: Literal["fgfi"] = "fgfi"
    neck_weight: Annotated[
        float,
        Field(
            description="Weight of the loss (lambda); the authors' code has 0.01.",
            ge=0,
            le=1e6,
            json_schema_extra=weighs("neck"),
        ),
    ] = 0.01
    threshold: Annotated[
        float,
        Field(
            description="An anchor is near an object if its IoU is above this share of the object's best (psi).",
            ge=0,
            lt=1,
        ),
    ] = 0.5


def imitation_masks(
    boxes: Sequence[Tensor], anchors: Sequence[Tensor], *, sizes: Sequence[tuple[int, int]], threshold: float
) -> list[Tensor]:
    """Return the cells of each level that have an anchor near an object (section 3.2).

    An anchor is near a box if their IoU is above `threshold` times the best IoU that any anchor has with that box. The
    paper has one map; on a pyramid the best is that of all levels, so that a box marks the levels that fit its size.

    Args:
        boxes: for each image (N_i, 4), x1 y1 x2 y2 in pixels of the padded batch.
        anchors: the anchors of each level, (H W A, 4) likewise, cell by cell in rows.
        sizes: height and width of each level's map.
        threshold: psi, 0 to 1; 0.5 in the paper.

    Returns:
        For each level (B, H, W) bool. A box that no anchor touches marks nothing.
    """
    counts = [len(level) for level in anchors]
    flat = torch.cat(list(anchors))
    near = torch.zeros(len(boxes), len(flat), dtype=torch.bool, device=flat.device)
    # A loop over images: the overlaps of all boxes of a batch with all anchors at once would be large.
    for row, of_image in zip(near, boxes, strict=True):
        if len(of_image):
            overlap = box_iou(of_image.to(flat.dtype), flat)  # (N_i, anchors)
            row.copy_((overlap > threshold * overlap.amax(dim=1, keepdim=True)).any(dim=0))
    levels = near.split(counts, dim=1)
    return [level.unflatten(1, (*size, -1)).any(dim=3) for level, size in zip(levels, sizes, strict=True)]


def fgfi_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return `1 / max(1, 2 N) * sum over masked cells of all levels, and channels, of (student - teacher)^2`.

    N counts the masked cells of the batch, on all levels together (equation 4; channels are not counted). Where several
    processes train together N is the mean over them.

    Args:
        student: adapted features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
        masks: (B, H, W) bool of each level.
    """
    sums = [
        torch.where(mask, (widened(ours) - theirs.detach()).square().sum(dim=1), 0.0).sum()
        for ours, theirs, mask in zip(student, teacher, masks, strict=True)
    ]
    cells, least = mean_over_ranks(torch.stack([mask.sum() for mask in masks]).sum())
    return torch.stack(sums).sum() / (2 * cells).clamp(min=least)


class FGFI(NeckMethod):
    """The loss and its adapters. The padding of a batch takes no part, unless an anchor there is near an object.

    Raises:
        RunError: `anchors_missing` if the student provides no anchors; else as `NeckMethod`.
    """

    def __init__(self, config: FGFIConfig, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher, NearZero)
        self.config = config
        if "anchors" not in student.provides:
            raise RunError(
                "user",
                "anchors_missing",
                f"fgfi masks the neck by the student's anchors, and the family {student.family} provides "
                "none: take a student that does, such as faster_rcnn or retinanet, or another method",
            )

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck`."""
        assert student.anchors is not None
        ours, theirs = self.maps(student, teacher)
        masks = imitation_masks(
            [target["boxes"] for target in student.targets],
            [student.anchors[index] for index, _ in self.pairs],
            sizes=[(one.shape[-2], one.shape[-1]) for one in ours],
            threshold=self.config.threshold,
        )
        return {"neck": self.config.neck_weight * fgfi_loss(ours, theirs, masks)}


METHOD = Entry(
    summary="The neck where anchors lie near objects; for students with anchors (Wang et al., CVPR 2019).",
    config=FGFIConfig,
    build=FGFI,
    needs=("neck", "student.anchors"),
)
