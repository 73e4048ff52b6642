"""The losses of DeFeat as functions of tensors (Guo et al., CVPR 2021, arXiv 2103.14475), and what all losses share."""

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from defeat.engine.detectors.precision import widened
from defeat.engine.methods.masks import BACKGROUND, OBJECT, PADDING

# Values that the neck loss works on at a time: few enough to stay in a processor's cache, and to need no memory.
BLOCK = {"cpu": 2**19, "cuda": 2**23}
# What the kernels take; other maps go block by block.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mean_over_ranks(sums: Tensor) -> tuple[Tensor, float]:
    """Return the mean of each sum or count over the processes that train together, and what a count of 1 comes to.

    A loss that each process divides by such a mean of counts has gradients whose average over processes is the gradient
    of one process with all their images. So has a loss that is made of such means alone, the same in all processes:
    each mean's gradient goes to this process's sum whole, the average over processes does the division. Nothing is
    exchanged on the way back, where processes need not come in the same order. In a process of its own the sums come
    back as they are, with 1.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return sums, 1.0
    return _MeanOverRanks.apply(sums.double()), 1.0 / distributed.get_world_size()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        summed = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed / distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


def decoupled_feature_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], kinds: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the object and the background part of the neck loss, unweighted.

    For each level, with M 1 on cells of a kind and 0 elsewhere, C channels and n cells of that kind in the batch:
    `1 / max(1, 2 C n) * sum(M * (student - teacher)^2)`; then the mean over levels. A level without objects adds
    nothing to the object part and still counts in the mean. Cells of the padding are of neither kind: they add nothing,
    and their gradient is 0. Where several processes train together n is the mean over them, see `mean_over_ranks`.

    Besides the gradient it needs next to no memory: differences are made block by block, or on a GPU by a kernel, once
    for the value and once more for the gradient. Gradients of the gradient there are none.

    Args:
        student: adapted features of each level, (B, C, H, W).
        teacher: the teacher's features of each level, same shapes; no gradient flows into them.
        kinds: (B, H, W) uint8 of each level, see `masks.cell_kinds`.

    Returns:
        Two scalars, float32 or wider.
    """
    counts, least = mean_over_ranks(
        torch.stack([torch.stack([(one == kind).sum() for kind in (OBJECT, BACKGROUND)]) for one in kinds])
    )
    # Multiplied by Python numbers: a tensor of them would have to be copied to the device, and the CPU would wait.
    values = torch.stack([2 * ours.shape[1] * count for ours, count in zip(student, counts, strict=True)])
    norms = values.double().clamp(min=least)  # (levels, 2)
    sums = torch.stack([_SquaredDifferences.apply(*level) for level in zip(student, teacher, kinds, strict=True)])
    objects, background = (sums / norms.to(sums.dtype)).mean(dim=0)
    return objects, background


class _SquaredDifferences(torch.autograd.Function):
    """The sums of `(student - teacher)^2` over object cells and over background cells, (2,), of one level."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kinds: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher, kinds)
        if kernels := kernels_for(student, teacher):
            sums: Tensor = kernels.squared_sums(student, teacher, kinds)
            return sums
        dtype = torch.promote_types(student.dtype, torch.float32)
        summed = torch.zeros(kinds.shape, dtype=dtype, device=student.device)
        for images, channels in _blocks(student):
            ours, theirs = student[images, channels], teacher[images, channels]
            difference = ours.to(dtype) - theirs
            # Summed over channels first: the mask then weighs one map instead of C of them. Under autocast it would be
            # in half precision, where such sums overflow.
            with torch.autocast(difference.device.type, enabled=False):
                summed[images] += torch.linalg.vecdot(difference, difference, dim=1)
        return torch.stack([torch.where(kinds == kind, summed, 0.0).sum() for kind in (OBJECT, BACKGROUND)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, kinds = ctx.saved_tensors
        if kernels := kernels_for(student, teacher):
            return kernels.gradient_of_sums(student, teacher, kinds, gradient), None, None
        # Not by `masked_fill_`, which reads a tensor's value on the CPU.
        weights = torch.where(kinds == OBJECT, gradient[0], gradient[1]).mul_(kinds != PADDING).mul_(2)
        weights = weights[:, None]  # (B, 1, H, W)
        result = torch.empty_like(student)
        for images, channels in _blocks(student):
            block, ours, theirs = (each[images, channels] for each in (result, student, teacher))
            if student.dtype == teacher.dtype == weights.dtype:
                torch.sub(ours, theirs, out=block).mul_(weights[images])
            else:
                block.copy_((ours.to(weights.dtype) - theirs).mul_(weights[images]))
        return result, None, None


def kernels_for(student: Tensor, teacher: Tensor) -> ModuleType | None:
    """Return the module `kernels` if it can take these maps: on a CUDA device where Triton works, not float64."""
    if not student.is_cuda or student.dtype not in _KERNEL_DTYPES or teacher.dtype not in _KERNEL_DTYPES:
        return None
    return _checked_kernels(student.device)


@cache
def _checked_kernels(device: torch.device) -> ModuleType | None:
    try:
        from defeat.engine.methods import kernels

        kernels.check(device)
    except Exception as error:  # whatever Triton or a driver raises: a run can do without
        warnings.warn(f"the neck loss goes block by block on {device}, for Triton does not work: {error}", stacklevel=2)
        return None
    return kernels


def _blocks(features: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, C, H, W) into blocks of images and channels of about `BLOCK` values."""
    batch, channels, height, width = features.shape
    size = BLOCK["cuda" if features.is_cuda else "cpu"]
    images = max(1, size // (channels * height * width))
    step = channels if images > 1 else max(1, size // (height * width))
    for first in range(0, batch, images):
        for channel in range(0, channels, step):
            yield slice(first, first + images), slice(channel, channel + step)


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
    temperature; a part without proposals is 0. Where several processes train together K is the mean over them.

    Args:
        student: class logits (P, classes + 1), background in column 0.
        teacher: logits of the same proposals; no gradient flows into them.
        labels: (P,) the proposals' classes, 0 for background: of THESE proposals.
        object_temperature: T of the positives, above 0.
        background_temperature: T of the negatives, above 0.
    """
    student, teacher = widened(student), widened(teacher.detach())
    positive = labels > 0
    counts, least = mean_over_ranks(torch.stack([positive.sum(), (~positive).sum()]))
    objects, background = counts.double().clamp(min=least).to(student.dtype)
    return (
        _divergence(student, teacher, positive, object_temperature) / objects,
        _divergence(student, teacher, ~positive, background_temperature) / background,
    )


def _divergence(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
    ours = F.log_softmax(student / temperature, dim=1)
    theirs = F.log_softmax(teacher / temperature, dim=1)
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)  # (P,)
    return temperature**2 * torch.where(rows, each, each.new_zeros(())).sum()
