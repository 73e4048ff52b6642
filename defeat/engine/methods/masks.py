"""Which cells of a pyramid level belong to objects, and which to an image at all.

The masks of DeFeat (authors' code, and a covering variant), the weights of FGD, and the padding of a batch.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MaskMode = Literal["paper", "cover"]

# What a cell of a level is, see `cell_kinds`.
PADDING, BACKGROUND, OBJECT = 0, 1, 2


def assign_levels(boxes: Tensor, *, levels: int, base_size: float) -> Tensor:
    """Return the one pyramid level that each box belongs to.

    `clamp(floor(log2(sqrt((w + 1) (h + 1)) / base_size + 1e-6)), 0, levels - 1)`, as the authors' code has it.

    Args:
        boxes: (N, 4), x1 y1 x2 y2 in pixels.
        levels: number of levels, finest first.
        base_size: box size in pixels whose double is the first to leave level 0; 56 in the paper.

    Returns:
        (N,) int64, 0 to levels - 1.
    """
    # float64: at a size that is base_size times a power of two, float32 may land on either side.
    width, height = (boxes[:, 2:] - boxes[:, :2]).double().unbind(1)
    size = ((width + 1) * (height + 1)).sqrt()
    return (size / base_size + 1e-6).log2().floor().clamp(0, levels - 1).long()


def cell_ranges(boxes: Tensor, *, stride: int, height: int, width: int, mode: MaskMode) -> Tensor:
    """Return the cells that each box covers on one level: (N, 4) int64, x1 y1 x2 y2 with x2 and y2 exclusive.

    `paper`: every coordinate is truncated; a range that is empty in x or in y becomes the one cell at its upper left
    corner (so a 1000 x 3 px box at stride 4 may mark one cell), moved inside the map. `cover`: every touched cell.
    """
    if mode == "cover":
        first = _at_most((boxes[:, :2] / stride).floor().long().clamp(min=0), width - 1, height - 1)
        last = _at_most((boxes[:, 2:] / stride).ceil().long(), width, height).maximum(first + 1)
        return torch.cat([first, last], dim=1)
    first, last = (boxes / stride).trunc().long().split(2, dim=1)
    empty = (last <= first).any(dim=1, keepdim=True)
    first = torch.where(empty, _at_most(first.clamp(min=0), width - 1, height - 1), first)
    last = torch.where(empty, first + 1, last)
    return torch.cat([first, last], dim=1)


def _at_most(cells: Tensor, column: int, row: int) -> Tensor:
    """Return cells (N, 2), x y, moved to at most this column and this row.

    Both limits are Python numbers: a tensor of them would have to be copied to the device, and the CPU would wait.
    """
    return torch.stack([cells[:, 0].clamp(max=column), cells[:, 1].clamp(max=row)], dim=1)


def _rows_and_columns(ranges: Tensor, *, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return which rows (N, H) and which columns (N, W) lie in each of the ranges (N, 4), bool."""
    x1, y1, x2, y2 = ranges.unbind(1)
    columns = torch.arange(width, device=ranges.device)
    rows = torch.arange(height, device=ranges.device)
    return (rows >= y1[:, None]) & (rows < y2[:, None]), (columns >= x1[:, None]) & (columns < x2[:, None])


def _inside(ranges: Tensor, *, height: int, width: int) -> Tensor:
    """Return which cells lie in each of the ranges (N, 4): (N, H, W) bool."""
    in_y, in_x = _rows_and_columns(ranges, height=height, width=width)
    return in_y[:, :, None] & in_x[:, None, :]


def object_masks(
    boxes: Sequence[Tensor],
    *,
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    mode: MaskMode = "paper",
    base_size: float = 56.0,
) -> list[Tensor]:
    """Return the object mask of each level; a box marks its own level only and is background on the others.

    Args:
        boxes: for each image (N_i, 4), x1 y1 x2 y2 in pixels of the padded batch.
        sizes: height and width of each level's map, finest first.
        strides: stride of each level in pixels.
        mode: how a box is turned into cells, see `cell_ranges`.
        base_size: see `assign_levels`.

    Returns:
        For each level (B, 1, H, W) bool, true on objects.
    """
    device = boxes[0].device
    flat = torch.cat(list(boxes))
    # (B, N): the boxes of each image. One comparison over all boxes instead of a loop over them, which would wait for
    # the device once a box; and filled there, for a copy to the device would be waited for as well.
    owner = torch.cat([torch.full((len(one),), index, device=device) for index, one in enumerate(boxes)])
    owned = torch.arange(len(boxes), device=device)[:, None] == owner
    level_of = assign_levels(flat, levels=len(sizes), base_size=base_size)
    masks = []
    for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        ranges = cell_ranges(flat, stride=stride, height=height, width=width, mode=mode)
        in_y, in_x = _rows_and_columns(ranges, height=height, width=width)
        # How many boxes lie on a cell, as a product of matrices, (B, H, N) by (N, W): without a map for each box. In
        # whatever precision it is made, a sum of ones is above 0.
        chosen = owned & (level_of == level)  # (B, N)
        counts = (chosen[:, :, None] & in_y).mT.float() @ in_x.float()
        masks.append((counts > 0)[:, None])
    return masks


def cells_inside(
    image_sizes: Sequence[tuple[int, int]],
    *,
    padded: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    device: torch.device,
) -> list[Tensor]:
    """Return which cells of each level touch an image; the others see only the padding of the batch.

    Row y of a level touches an image if `y * stride < height`, column x if `x * stride < width`. An image as high as
    the batch touches every row, and one as wide every column, whatever the stride: strides of SSD's maps are rounded,
    and its batches have no padding.

    Args:
        image_sizes: height and width in pixels of each image, without the padding.
        padded: height and width in pixels of the batch.
        sizes: height and width of each level's map.
        strides: stride of each level in pixels.
        device: where the result is made. Nothing is copied there, see `_at_most`.

    Returns:
        For each level (B, H, W) bool.
    """
    endless = torch.iinfo(torch.int64).max
    reach = [[size[axis] if size[axis] < padded[axis] else endless for size in image_sizes] for axis in (0, 1)]
    high, wide = (torch.cat([torch.full((1, 1), one, device=device) for one in ends]) for ends in reach)  # (B, 1)
    inside = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        rows = torch.arange(height, device=device) * stride < high
        columns = torch.arange(width, device=device) * stride < wide
        inside.append(rows[:, :, None] & columns[:, None, :])
    return inside


def cell_kinds(objects: Sequence[Tensor], inside: Sequence[Tensor]) -> list[Tensor]:
    """Return what each cell is: (B, H, W) uint8 of each level, `OBJECT`, `BACKGROUND` or `PADDING`.

    Args:
        objects: (B, 1, H, W) bool of each level, true on objects, see `object_masks`.
        inside: (B, H, W) bool of each level, see `cells_inside`.
    """
    return [
        (BACKGROUND * one.byte()).masked_fill_(mask[:, 0], OBJECT) for mask, one in zip(objects, inside, strict=True)
    ]


def focal_weights(
    boxes: Sequence[Tensor], inside: Tensor, *, size: tuple[int, int], stride: int
) -> tuple[Tensor, Tensor]:
    """Return FGD's weights of the cells of one level, of objects and of background.

    A cell in a box weighs 1 over the cells of that box, of the smallest where there are several: small boxes count as
    much as large ones. A cell of the background weighs 1 over the background's cells in its image, and one of the
    padding nothing. A box marks each cell that it touches, on every level.

    Args:
        boxes: for each image (N_i, 4), x1 y1 x2 y2 in pixels of the padded batch.
        inside: (B, H, W) bool, which cells are no padding, see `cells_inside`.
        size: height and width of the level's map.
        stride: its stride in pixels.

    Returns:
        Two of (B, H, W) float32; the one is 0 where the other is not.
    """
    height, width = size
    foreground = torch.zeros(len(boxes), height, width, device=boxes[0].device)
    # A loop over images, not over boxes: a level's maps of all boxes of a batch at once would be large.
    for weights, of_image in zip(foreground, boxes, strict=True):
        if len(of_image):
            ranges = cell_ranges(of_image, stride=stride, height=height, width=width, mode="cover")
            cells = (ranges[:, 2:] - ranges[:, :2]).prod(dim=1)  # (N_i,)
            in_box = _inside(ranges, height=height, width=width)
            weights.copy_((in_box / cells[:, None, None]).amax(dim=0))
    background = (foreground == 0) & inside
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)
