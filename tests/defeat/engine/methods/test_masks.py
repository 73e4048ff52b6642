"""The masks against a plain restatement, written from the description: loops, Python floats."""

import math
import random

import pytest
import torch

from defeat.engine.methods.masks import (
    BACKGROUND,
    OBJECT,
    PADDING,
    assign_levels,
    cell_kinds,
    cells_inside,
    object_masks,
)

STRIDES = (4, 8, 16, 32, 64)


def restated(boxes, sizes, strides, mode, base):
    """Masks by loops over images, boxes and cells."""
    masks = [torch.zeros(len(boxes), 1, h, w, dtype=torch.bool) for h, w in sizes]
    for image, of_image in enumerate(boxes):
        for x1, y1, x2, y2 in of_image.tolist():
            size = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
            level = min(max(math.floor(math.log2(size / base + 1e-6)), 0), len(sizes) - 1)
            (height, width), stride = sizes[level], strides[level]
            if mode == "cover":
                columns = [c for c in range(width) if c * stride < x2 and (c + 1) * stride > x1]
                rows = [r for r in range(height) if r * stride < y2 and (r + 1) * stride > y1]
                columns = columns or [min(max(math.floor(x1 / stride), 0), width - 1)]
                rows = rows or [min(max(math.floor(y1 / stride), 0), height - 1)]
            else:
                left, top, right, bottom = (int(v / stride) for v in (x1, y1, x2, y2))
                if right <= left or bottom <= top:
                    columns, rows = [min(left, width - 1)], [min(top, height - 1)]
                else:
                    columns, rows = range(left, min(right, width)), range(top, min(bottom, height))
            for row in rows:
                for column in columns:
                    masks[level][image, 0, row, column] = True
    return masks


def restated_inside(image_sizes, sizes, strides):
    """Which cells have at least a pixel of their image, by loops."""
    inside = [torch.zeros(len(image_sizes), *size, dtype=torch.bool) for size in sizes]
    for cells, (rows, columns), stride in zip(inside, sizes, strides, strict=True):
        for image, (height, width) in enumerate(image_sizes):
            for y in range(rows):
                for x in range(columns):
                    cells[image, y, x] = y * stride < height and x * stride < width
    return inside


def restated_kinds(masks, inside):
    """The kind of each cell: an object's, else the background's if it is inside, else the padding's."""
    kinds = [torch.full(cells.shape, PADDING, dtype=torch.uint8) for cells in inside]
    for found, mask, cells in zip(kinds, masks, inside, strict=True):
        found[cells] = BACKGROUND
        found[mask[:, 0]] = OBJECT
    return kinds


def random_boxes(rng, width, height):
    """Boxes of every kind: ordinary, thin, of no size, at the border, of a size on the edge between two levels."""
    count = rng.choice([0, 1, 3, 9])
    boxes = []
    for _ in range(count):
        kind = rng.randrange(5)
        x1, y1 = rng.uniform(0, width), rng.uniform(0, height)
        x2, y2 = rng.uniform(x1, width), rng.uniform(y1, height)
        if kind == 1:
            y2 = min(y1 + rng.uniform(0, 3), height)
        elif kind == 2:
            x2 = x1
        elif kind == 3:
            x1, x2 = rng.choice([(width, width), (0.0, 0.0), (width - 1.0, float(width))])
        elif kind == 4:
            side = rng.choice([55, 111, 223, 447])
            x1, y1 = math.floor(x1), math.floor(y1)
            x2, y2 = min(x1 + side, width), min(y1 + side, height)
        boxes.append([x1, y1, x2, y2])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize(
    ("mode", "base", "batches"),
    [("paper", 56.0, 1000), ("paper", 28.0, 250), ("cover", 56.0, 250), ("cover", 28.0, 250)],
)
def test_masks_equal_the_restatement_on_random_batches(mode, base, batches):
    rng = random.Random(f"{mode}{base}")
    for _ in range(batches):
        width, height = 32 * rng.randint(1, 20), 32 * rng.randint(1, 16)
        strides = STRIDES[: rng.randint(1, 5)]
        sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]
        boxes = [random_boxes(rng, width, height) for _ in range(rng.randint(1, 4))]
        expected = restated(boxes, sizes, strides, mode, base)
        masks = object_masks(boxes, sizes=sizes, strides=strides, mode=mode, base_size=base)
        for ours, theirs in zip(masks, expected, strict=True):
            assert ours.dtype == torch.bool
            assert torch.equal(ours, theirs)


def test_a_thin_box_marks_one_cell_on_paper_and_all_it_touches_under_cover():
    box = [torch.tensor([[8.0, 9.0, 1008.0, 12.0]])]
    marked = {
        mode: [int(m.sum()) for m in object_masks(box, sizes=[(64, 256)], strides=[4], mode=mode)]
        for mode in ("paper", "cover")
    }
    assert marked == {"paper": [250], "cover": [250]}
    # 9 / 4 and 11.9 / 4 fall into the same row: an empty range, so one cell.
    box = [torch.tensor([[8.0, 9.0, 1008.0, 11.9]])]
    assert int(object_masks(box, sizes=[(64, 256)], strides=[4], mode="paper")[0].sum()) == 1
    assert int(object_masks(box, sizes=[(64, 256)], strides=[4], mode="cover")[0].sum()) == 250


def test_coordinates_left_of_the_image_are_truncated_towards_it():
    box = [torch.tensor([[-3.0, -5.0, 3.0, 11.0]])]
    (paper,) = object_masks(box, sizes=[(4, 4)], strides=[4])
    # int(-3 / 4) and int(3 / 4) are both 0: a range that is empty, so one cell, at int(-5 / 4) moved inside.
    assert paper.nonzero().tolist() == [[0, 0, 0, 0]]


def test_levels_double_in_size():
    sides = torch.tensor([1.0, 110.9, 111.0, 222.9, 223.0, 447.0, 895.0, 5000.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    assert assign_levels(boxes, levels=5, base_size=56).tolist() == [0, 0, 1, 1, 2, 3, 4, 4]


def test_no_boxes_at_all():
    masks = object_masks([torch.zeros(0, 4)] * 2, sizes=[(4, 6), (2, 3)], strides=[8, 16])
    assert [mask.shape for mask in masks] == [(2, 1, 4, 6), (2, 1, 2, 3)]
    assert not any(mask.any() for mask in masks)


def padded_to(sides, multiple=32):
    return max(-(-side // multiple) * multiple for side in sides)


@pytest.mark.parametrize("seed", range(5))
def test_cells_inside_equal_the_restatement_and_hold_every_object(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(50):
        image_sizes = [(rng.randint(20, 400), rng.randint(20, 400)) for _ in range(rng.randint(1, 4))]
        padded = tuple(padded_to(sides) for sides in zip(*image_sizes, strict=True))
        strides = (*STRIDES, 128)
        sizes = [tuple(math.ceil(side / stride) for side in padded) for stride in strides]
        inside = cells_inside(image_sizes, padded=padded, sizes=sizes, strides=strides, device=torch.device("cpu"))
        expected = restated_inside(image_sizes, sizes, strides)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(inside, expected, strict=True))
        boxes = []
        for height, width in image_sizes:
            corner = torch.rand(6, 2, generator=generator) * torch.tensor([width - 1.0, height - 1.0])
            other = corner + 0.1 + torch.rand(6, 2, generator=generator) * torch.tensor([width, height])
            boxes.append(torch.cat([corner, other.minimum(torch.tensor([float(width), float(height)]))], dim=1))
        for mode in ("paper", "cover"):
            masks = object_masks(boxes, sizes=sizes, strides=strides, mode=mode)
            kinds = cell_kinds(masks, inside)
            for ours, theirs, mask, cells in zip(kinds, restated_kinds(masks, inside), masks, inside, strict=True):
                assert ours.dtype == torch.uint8
                assert torch.equal(ours, theirs)
                assert not (mask[:, 0] & ~cells).any()


def test_without_padding_every_cell_is_inside_whatever_its_stride():
    """Maps of an SSD: of 184 px one has 4 rows of 46, and is said to have stride 64."""
    inside = cells_inside([(184, 184)] * 2, padded=(184, 184), sizes=[(4, 4)], strides=[64], device=torch.device("cpu"))
    assert inside[0].all()
    narrow = cells_inside([(184, 100)], padded=(184, 184), sizes=[(4, 4)], strides=[64], device=torch.device("cpu"))
    assert narrow[0].tolist() == [[[True, True, False, False]] * 4]
