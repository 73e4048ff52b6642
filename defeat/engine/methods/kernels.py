"""The neck loss's sums and their gradient on a CUDA device, each in one pass over both maps, in Triton.

Imported only where a map is on such a device: see `defeat.engine.methods.losses.kernels_for`.

No GPU has run these kernels yet. Triton's interpreter has, on a CPU, value by value against the formula, and its
compiler has made code for CUDA devices of them: `tests/defeat/engine/methods/test_kernels.py`. Hence `check`, which a
process runs once on its device before anything is handed to them.
"""

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from defeat.engine.methods.masks import BACKGROUND, OBJECT

# Channels and cells that one program takes, 2048 values of each map, by what lies side by side in memory: the cells of
# a channel (contiguous), the channels of a cell (channels_last), or not the same in both maps. Each map is then read in
# runs of 32 values or more.
_CELLS_DENSE, _CHANNELS_DENSE, _MIXED = (16, 128), (128, 16), (64, 32)
# A map of so many values or more has offsets that do not fit 32 bits.
_WIDE = 2**31


@triton.jit
def _place(
    channels: tl.tensor,
    cells: tl.tensor,
    TILE_CHANNELS: tl.constexpr,  # noqa: N803 - Triton's habit for what is fixed when a kernel is compiled
    TILE_CELLS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
) -> Any:
    """Return this program's image, its channels and its cells; the latter run beyond the map at its edges."""
    across, along = tl.cdiv(channels, TILE_CHANNELS), tl.cdiv(cells, TILE_CELLS)
    program = tl.program_id(0)
    image = program // (across * along)
    channel = (program // along) % across * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    cell = program % along * TILE_CELLS + tl.arange(0, TILE_CELLS)
    if WIDE:
        image, channel, cell = image.to(tl.int64), channel.to(tl.int64), cell.to(tl.int64)
    return image, channel, cell


@triton.jit
def _sums(
    student: tl.tensor,
    teacher: tl.tensor,
    kinds: tl.tensor,
    parts: tl.tensor,
    student_image: tl.tensor,
    student_channel: tl.tensor,
    student_cell: tl.tensor,
    teacher_image: tl.tensor,
    teacher_channel: tl.tensor,
    teacher_cell: tl.tensor,
    channels: tl.tensor,
    cells: tl.tensor,
    TILE_CHANNELS: tl.constexpr,  # noqa: N803
    TILE_CELLS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    OBJECT: tl.constexpr,  # noqa: N803
    BACKGROUND: tl.constexpr,  # noqa: N803
) -> None:
    """Write the two sums of one tile to `parts`, (2, programs)."""
    image, channel, cell = _place(channels, cells, TILE_CHANNELS, TILE_CELLS, WIDE)
    inside = (channel < channels)[:, None] & (cell < cells)[None, :]
    ours_at = student + image * student_image + channel[:, None] * student_channel + cell[None, :] * student_cell
    theirs_at = teacher + image * teacher_image + channel[:, None] * teacher_channel + cell[None, :] * teacher_cell
    ours = tl.load(ours_at, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(theirs_at, mask=inside, other=0.0).to(tl.float32)
    kind = tl.load(kinds + image * cells + cell, mask=cell < cells, other=0)
    squares = tl.sum((ours - theirs) * (ours - theirs), axis=0)  # (cells of the tile,)
    program = tl.program_id(0)
    tl.store(parts + program, tl.sum(tl.where(kind == OBJECT, squares, 0.0), axis=0))
    tl.store(parts + tl.num_programs(0) + program, tl.sum(tl.where(kind == BACKGROUND, squares, 0.0), axis=0))


@triton.jit
def _gradient(
    student: tl.tensor,
    teacher: tl.tensor,
    kinds: tl.tensor,
    incoming: tl.tensor,
    result: tl.tensor,
    student_image: tl.tensor,
    student_channel: tl.tensor,
    student_cell: tl.tensor,
    teacher_image: tl.tensor,
    teacher_channel: tl.tensor,
    teacher_cell: tl.tensor,
    channels: tl.tensor,
    cells: tl.tensor,
    TILE_CHANNELS: tl.constexpr,  # noqa: N803
    TILE_CELLS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    OBJECT: tl.constexpr,  # noqa: N803
    BACKGROUND: tl.constexpr,  # noqa: N803
) -> None:
    """Write the gradient of one tile to `result`, which has the student's strides."""
    image, channel, cell = _place(channels, cells, TILE_CHANNELS, TILE_CELLS, WIDE)
    inside = (channel < channels)[:, None] & (cell < cells)[None, :]
    ours_at = image * student_image + channel[:, None] * student_channel + cell[None, :] * student_cell
    theirs_at = teacher + image * teacher_image + channel[:, None] * teacher_channel + cell[None, :] * teacher_cell
    ours = tl.load(student + ours_at, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(theirs_at, mask=inside, other=0.0).to(tl.float32)
    kind = tl.load(kinds + image * cells + cell, mask=cell < cells, other=0)
    background = tl.where(kind == BACKGROUND, 2 * tl.load(incoming + 1), 0.0)
    weight = tl.where(kind == OBJECT, 2 * tl.load(incoming), background)
    made = (ours - theirs) * weight[None, :]
    tl.store(result + ours_at, made.to(result.dtype.element_ty), mask=inside)


def squared_sums(student: Tensor, teacher: Tensor, kinds: Tensor) -> Tensor:
    """Return the sums of `(student - teacher)^2` over object cells and over background cells, (2,) float32.

    Each program writes its own two sums, and these are added in one order: the same maps give the same bits.

    Args:
        student: (B, C, H, W) float32, bfloat16 or float16; contiguous or channels_last, else it is copied.
        teacher: likewise; its dtype and memory format may differ from the student's.
        kinds: (B, H, W) uint8, see `masks.cell_kinds`.
    """
    launch = _Launch(student, teacher, kinds)
    parts = torch.empty(2, launch.programs, dtype=torch.float32, device=student.device)
    launch(_sums, parts)
    return parts.sum(dim=1)


def gradient_of_sums(student: Tensor, teacher: Tensor, kinds: Tensor, incoming: Tensor) -> Tensor:
    """Return the gradient in `student` of both sums, each times its value of `incoming`.

    Args:
        student: as for `squared_sums`.
        teacher: likewise.
        kinds: likewise.
        incoming: (2,) float32, the loss's gradient in the two sums.

    Returns:
        (B, C, H, W) of the student's dtype and memory format.
    """
    launch = _Launch(student, teacher, kinds)
    result = torch.empty_like(launch.student)
    launch(_gradient, incoming.contiguous(), result)
    return result


class _Launch:
    """How a pair of maps is cut into tiles, a program for each.

    Attributes:
        student: the student's map as the kernels read it.
        programs: the number of tiles.
    """

    def __init__(self, student: Tensor, teacher: Tensor, kinds: Tensor) -> None:
        self.student, self._teacher, self._kinds = _dense(student), _dense(teacher), kinds.contiguous()
        batch, channels, height, width = student.shape
        self._shape = channels, height * width
        self._strides = (*_strides(self.student), *_strides(self._teacher))
        by_channel = [self._strides[index] == 1 for index in (1, 4)]
        self._tile = _MIXED if any(by_channel) else _CELLS_DENSE
        if all(by_channel):
            self._tile = _CHANNELS_DENSE
        sides = (math.ceil(side / tile) for side, tile in zip(self._shape, self._tile, strict=True))
        self.programs = batch * math.prod(sides)

    def __call__(self, kernel: Any, *given: Tensor) -> None:
        """Queue a kernel; it gets both maps, the kinds, what is `given`, and where values lie."""
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device_of(self.student):
            kernel[(self.programs,)](
                self.student,
                self._teacher,
                self._kinds,
                *given,
                *self._strides,
                *self._shape,
                TILE_CHANNELS=self._tile[0],
                TILE_CELLS=self._tile[1],
                WIDE=self.student.numel() >= _WIDE,
                OBJECT=OBJECT,
                BACKGROUND=BACKGROUND,
            )


def _dense(features: Tensor) -> Tensor:
    """Return the map itself if its cells follow each other evenly without gaps, else a copy of which that is true."""
    last = features.is_contiguous(memory_format=torch.channels_last)
    return features if last else features.contiguous()


def _strides(features: Tensor) -> tuple[int, int, int]:
    """Return how many values apart images, channels and cells are."""
    image, channel, row, column = features.stride()
    # A side of one cell may have any stride.
    return image, channel, column if features.shape[3] > 1 else row


def check(device: torch.device) -> None:
    """Run both kernels on a small map and compare; once in a process, for it waits for the device.

    Raises:
        RuntimeError: a result is not the formula's; Triton raises whatever it finds, such as no C compiler.
    """
    student = torch.arange(120.0, device=device).view(2, 3, 4, 5)
    teacher = student.flip(3) * 2
    kinds = (torch.arange(40, device=device) % 3).byte().view(2, 4, 5)
    incoming = student[0, 0, 0, 1:3]
    # Small whole numbers: exact in whatever order they are added.
    difference = student - teacher
    squares, masks = difference.square().sum(dim=1), [kinds == kind for kind in (OBJECT, BACKGROUND)]
    sums = torch.stack([torch.where(mask, squares, 0.0).sum() for mask in masks])
    weights = torch.stack([mask * weight for mask, weight in zip(masks, incoming, strict=True)]).sum(dim=0)
    gradient = 2 * difference * weights[:, None]
    found = squared_sums(student, teacher, kinds), gradient_of_sums(student, teacher, kinds, incoming)
    if not all(torch.equal(mine, plain) for mine, plain in zip(found, (sums, gradient), strict=True)):
        raise RuntimeError(f"the kernels of the neck loss compute something else on {device}")
