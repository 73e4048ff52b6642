"""The losses of DeFeat as functions of tensors (Guo et al., CVPR 2021, arXiv 2103.14475), and what all losses share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider, also under autocast: a sum of millions of squares does not fit a half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def decoupled_feature_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the object and the background part of the neck loss, unweighted.

    For each level, with M the mask, C channels and n cells of a kind in the batch:
    `1 / max(1, 2 C n) * sum(M * (student - teacher)^2)`, likewise with 1 - M; then the mean over levels. A level
    without objects adds nothing to the object part and still counts in the mean.

    Args:
        student: adapted features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
        masks: (B, 1, H, W) bool of each level, true on objects.

    Returns:
        Two scalars, float32 or wider.
    """
    objects, background = [], []
    for ours, theirs, mask in zip(student, teacher, masks, strict=True):
        channels = ours.shape[1]
        # Summed over channels first: the mask then weighs one map instead of C of them.
        difference = (widened(ours) - theirs.detach()).square().sum(dim=1)
        cells = mask[:, 0]  # (B, H, W)
        objects.append(_masked_mean(difference, cells, channels))
        background.append(_masked_mean(difference, ~cells, channels))
    return torch.stack(objects).mean(), torch.stack(background).mean()


def _masked_mean(difference: Tensor, cells: Tensor, channels: int) -> Tensor:
    count = (2 * channels * cells.sum()).clamp(min=1)
    return torch.where(cells, difference, difference.new_zeros(())).sum() / count


def decoupled_logit_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    object_temperature: float,
    background_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the positive and the negative part of the head loss, unweighted.

    `T^2 / K * sum over the K proposals of KL(softmax(teacher / T) || softmax(student / T))`, each part with its own
    temperature; a part without proposals is 0.

    Args:
        student: class logits (P, classes + 1), background in column 0.
        teacher: logits of the same proposals; no gradient flows into them.
        labels: (P,) the proposals' classes, 0 for background: of THESE proposals.
        object_temperature: T of the positives, above 0.
        background_temperature: T of the negatives, above 0.
    """
    student, teacher = widened(student), widened(teacher.detach())
    positive = labels > 0
    return (
        _divergence(student, teacher, positive, object_temperature),
        _divergence(student, teacher, ~positive, background_temperature),
    )


def _divergence(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
    ours = F.log_softmax(student / temperature, dim=1)
    theirs = F.log_softmax(teacher / temperature, dim=1)
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)  # (P,)
    return temperature**2 * torch.where(rows, each, each.new_zeros(())).sum() / rows.sum().clamp(min=1)
