"""FGD's losses against their formulas: loops and float64."""

import math

import pytest
import torch

from defeat.engine import methods
from defeat.engine.methods.fgd import Relation, focal_loss, relation_loss
from defeat.engine.methods.masks import focal_weights
from tests.defeat.engine.methods.test_masks import restated_inside
from tests.support.methods import START, assert_same_loss, levels, one_pass, pair


def restated_attention(features, t):
    """Lists by image: attention of each cell by (y, x), and of each channel."""
    batch, channels, height, width = features.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    spatial, channel = [], []
    for b in range(batch):
        sizes = {
            cell: (sum(features[b, c, cell[0], cell[1]].abs() for c in range(channels)) / channels / t).exp()
            for cell in cells
        }
        spatial.append({cell: height * width * sizes[cell] / sum(sizes.values()) for cell in cells})
        sizes = [(sum(features[b, c, y, x].abs() for y, x in cells) / len(cells) / t).exp() for c in range(channels)]
        channel.append([channels * size / sum(sizes) for size in sizes])
    return spatial, channel


def restated_focal(student, teacher, foreground, background, t):
    batch, channels, _, _ = student.shape
    ours_spatial, ours_channel = restated_attention(student, t)
    spatial, channel = restated_attention(teacher, t)
    objects = behind = attended = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        for (y, x), attention in spatial[b].items():
            for c in range(channels):
                square = attention * channel[b][c] * (student[b, c, y, x] - teacher[b, c, y, x]) ** 2
                objects = objects + foreground[b, y, x] * square
                behind = behind + background[b, y, x] * square
            attended = attended + (ours_spatial[b][y, x] - attention).abs()
        for c in range(channels):
            attended = attended + (ours_channel[b][c] - channel[b][c]).abs()
    return objects / batch, behind / batch, attended / batch


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_focal_parts_and_gradients_equal_the_restatement(temperature):
    (student, *_), (teacher, *_) = levels(2)
    generator = torch.Generator().manual_seed(0)
    foreground, background = torch.rand(2, 2, 5, 4, generator=generator, dtype=torch.float64)
    ours = focal_loss(student, teacher, foreground, background, temperature=temperature)
    plain = restated_focal(student, teacher, foreground, background, temperature)
    for mine, other in zip(ours, plain, strict=True):
        assert_same_loss(mine, other, [student])


def restated_relation(block, features):
    """The block on one image (C, H, W): a dictionary from (channel, y, x) to the related value."""
    channels, height, width = features.shape
    first, norm, _, last = block.transform
    hidden = channels // 2
    cells = [(y, x) for y in range(height) for x in range(width)]
    keys = [
        (block.key.bias[0] + sum(block.key.weight[0, c, 0, 0] * features[c, y, x] for c in range(channels))).exp()
        for y, x in cells
    ]
    context = [
        sum(key * features[c, y, x] for key, (y, x) in zip(keys, cells, strict=True)) / sum(keys)
        for c in range(channels)
    ]
    inner = [first.bias[h] + sum(first.weight[h, c, 0, 0] * context[c] for c in range(channels)) for h in range(hidden)]
    mean = sum(inner) / hidden
    deviation = (sum((value - mean) ** 2 for value in inner) / hidden + norm.eps) ** 0.5
    normed = [
        ((inner[h] - mean) / deviation * norm.weight[h, 0, 0] + norm.bias[h, 0, 0]).clamp(min=0) for h in range(hidden)
    ]
    added = [last.bias[c] + sum(last.weight[c, h, 0, 0] * normed[h] for h in range(hidden)) for c in range(channels)]
    return {(c, y, x): features[c, y, x] + added[c] for c in range(channels) for y, x in cells}


def test_the_relation_part_and_gradients_equal_the_restatement():
    (_, student, _), (_, teacher, _) = levels(3, channels=6)
    torch.manual_seed(0)
    blocks = [Relation(6).double() for _ in range(2)]
    for block in blocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
    ours = relation_loss(blocks[0](student), blocks[1](teacher))
    plain = torch.zeros((), dtype=torch.float64)
    for b in range(len(student)):
        mine, other = restated_relation(blocks[0], student[b]), restated_relation(blocks[1], teacher[b])
        plain = plain + sum((mine[key] - other[key]) ** 2 for key in mine)
    assert_same_loss(ours, plain / len(student), [student, blocks[0].key.weight, blocks[1].transform[-1].weight])


def test_a_new_relation_block_changes_nothing():
    features = torch.randn(2, 8, 3, 4)
    assert torch.equal(Relation(8)(features), features)


def restated_weights(boxes, inside, height, width, stride):
    foreground, background = torch.zeros(2, len(boxes), height, width)
    for image, of_image in enumerate(boxes):
        for x1, y1, x2, y2 in of_image.tolist():
            columns = [c for c in range(width) if c * stride < x2 and (c + 1) * stride > x1]
            rows = [r for r in range(height) if r * stride < y2 and (r + 1) * stride > y1]
            for row in rows:
                for column in columns:
                    weight = 1 / (len(rows) * len(columns))
                    foreground[image, row, column] = max(weight, foreground[image, row, column].item())
        empty = [
            (y, x) for y in range(height) for x in range(width) if inside[image, y, x] and foreground[image, y, x] == 0
        ]
        for y, x in empty:
            background[image, y, x] = 1 / len(empty)
    return foreground, background


def test_weights_equal_the_restatement():
    generator = torch.Generator().manual_seed(0)
    for stride in (4, 8, 32):
        height, width = math.ceil(64 / stride), math.ceil(96 / stride)
        corner = torch.rand(4, 5, 2, generator=generator) * torch.tensor([90.0, 60.0])
        other = corner + 0.1 + torch.rand(4, 5, 2, generator=generator) * 40
        boxes = list(torch.cat([corner, other.minimum(torch.tensor([96.0, 64.0]))], dim=2))
        boxes += [torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 96.0, 64.0]])]  # all background, and none
        image_sizes = [(64, 96), (64, 70), (40, 96), (33, 47), (48, 48), (64, 96)]
        (inside,) = restated_inside(image_sizes, [(height, width)], [stride])
        ours = focal_weights(boxes, inside, size=(height, width), stride=stride)
        for mine, plain in zip(ours, restated_weights(boxes, inside, height, width, stride), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-6, atol=0)


def test_the_weights_of_the_losses_are_the_authors_unless_given():
    student, teacher = pair()
    assert list(methods.build({"method": "fgd"}, student, teacher).weights.values()) == [5e-5, 2.5e-5, 5e-5, 5e-7]
    student.head_kind = "one_stage"
    given = {"method": "fgd", "background_weight": 0.25}
    assert list(methods.build(given, student, teacher).weights.values()) == [1e-3, 0.25, 1e-3, 5e-6]


def test_the_method_sums_the_levels():
    student, teacher = pair(student_channels=16)
    method = methods.build({"method": "fgd"}, student, teacher)
    passed = one_pass(student)
    theirs = list(teacher.features(passed.images).values())
    sums = torch.zeros(4, dtype=torch.float64)
    for stride, mine, other in zip(student.strides, passed.features.values(), theirs, strict=True):
        boxes = [target["boxes"] for target in passed.targets]
        (inside,) = restated_inside(passed.image_sizes, [mine.shape[-2:]], [stride])
        assert not inside.all()
        foreground, background = focal_weights(boxes, inside, size=mine.shape[-2:], stride=stride)
        parts = focal_loss(mine.double(), other.double(), foreground, background, temperature=0.5)
        # Untrained relation blocks hand on what they get.
        sums += torch.stack([*parts, (mine.double() - other.double()).square().sum() / len(mine)]).detach()
    expected = sums * torch.tensor([5e-5, 2.5e-5, 5e-5, 5e-7], dtype=torch.float64)
    ours = torch.stack(list(method(passed, teacher, START).values()))
    torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-5, atol=0)
