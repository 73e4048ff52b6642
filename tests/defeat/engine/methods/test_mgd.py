"""MGD's loss and generator against their formulas: loops and float64."""

import pytest
import torch

from defeat.engine import methods
from defeat.engine.methods.mgd import Generation, blank, mgd_loss
from tests.support.methods import START, assert_same_loss, levels, one_pass, pair


def restated_convolution(layer, features):
    """A 3x3 convolution with padding 1, of one image (C, H, W), as nested lists by channel, row, column."""
    channels, height, width = len(features), len(features[0]), len(features[0][0])
    return [
        [
            [
                layer.bias[out]
                + sum(
                    layer.weight[out, c, dy + 1, dx + 1] * features[c][y + dy][x + dx]
                    for c in range(channels)
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if 0 <= y + dy < height and 0 <= x + dx < width
                )
                for x in range(width)
            ]
            for y in range(height)
        ]
        for out in range(len(layer.bias))
    ]


def restated(generations, student, teacher):
    """`sum (G(S) - T)^2 / B` by loops, summed over levels."""
    total = torch.zeros((), dtype=torch.float64)
    for (first, _, last), ours, theirs in zip(generations, student, teacher, strict=True):
        batch, channels, height, width = ours.shape
        for b in range(batch):
            hidden = restated_convolution(first, ours[b])
            hidden = [[[value.clamp(min=0) for value in row] for row in channel] for channel in hidden]
            made = restated_convolution(last, hidden)
            for c in range(channels):
                for y in range(height):
                    for x in range(width):
                        total = total + (made[c][y][x] - theirs[b, c, y, x]) ** 2 / batch
    return total


def test_loss_and_gradients_equal_the_restatement():
    student, teacher = levels(4, channels=2)
    torch.manual_seed(0)
    generations = [Generation(2).double() for _ in student]
    ours = mgd_loss([generation(one) for generation, one in zip(generations, student, strict=True)], teacher)
    weights = [generation[0].weight for generation in generations]
    assert_same_loss(ours, restated(generations, student, teacher), [*student, *weights])


def test_whole_cells_are_blanked_at_the_given_share():
    torch.manual_seed(0)
    features = torch.rand(2, 3, 100, 120) + 1
    blanked = blank(features, masked_fraction=0.65)
    gone = blanked == 0
    assert torch.equal(gone.all(dim=1), gone.any(dim=1))
    assert torch.equal(blanked[~gone], features[~gone])
    assert gone.float().mean().item() == pytest.approx(0.65, abs=0.01)  # 24 000 cells: 3 sigma
    assert not torch.equal(gone[0], gone[1])
    assert torch.equal(blank(features, masked_fraction=0.0), features)


def test_the_method_blanks_the_adapted_maps_and_generates_from_them():
    student, teacher = pair()
    method = methods.build({"method": "mgd", "neck_weight": 2.0}, student, teacher)
    passed = one_pass(student)
    state = torch.get_rng_state()
    loss = method(passed, teacher, START)["neck"]
    torch.set_rng_state(state)
    generated = [
        generation(blank(adapter(one), masked_fraction=0.45))
        for generation, adapter, one in zip(method.generations, method.adapters, passed.features.values(), strict=True)
    ]
    assert torch.equal(loss, 2 * mgd_loss(generated, list(teacher.features(passed.images).values())))


def test_weight_and_share_are_the_authors_unless_given():
    student, teacher = pair()
    method = methods.build({"method": "mgd"}, student, teacher)
    assert (method.weight, method.masked_fraction) == (5e-7, 0.45)
    student.head_kind = "one_stage"
    method = methods.build({"method": "mgd"}, student, teacher)
    assert (method.weight, method.masked_fraction) == (2e-5, 0.65)
    method = methods.build({"method": "mgd", "masked_fraction": 0.5}, student, teacher)
    assert (method.weight, method.masked_fraction) == (2e-5, 0.5)
