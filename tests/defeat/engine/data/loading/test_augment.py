"""Random changes: boxes stay on what they bound, whatever is done to the pixels."""

import pytest
import torch

from defeat.engine.data.loading.augment import (
    GREY,
    Augmentation,
    flip,
    flip_vertically,
    kept,
    mosaic,
    seeded,
    zoom_out,
)
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.resize import InputSize
from defeat.engine.report import RunError

HEIGHT, WIDTH = 60, 90
SIZE = InputSize(min_size=60, max_size=90)
OFF = {"horizontal_flip": 0}


def sample(seed=0, boxes=2):
    """A black image with solid rectangles, each of a brightness of its own, in whole pixels and apart."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    corners = []
    for index in range(boxes):
        x = 4 + 44 * index + int(torch.randint(0, 12, (), generator=generator))
        y = int(torch.randint(2, 20, (), generator=generator))
        w, h = (int(side) for side in torch.randint(12, 28, (2,), generator=generator))
        image[:, y : y + h, x : x + w] = 100 + 50 * index
        corners.append([x, y, x + w, y + h])
    labels = torch.arange(1, boxes + 1)
    return image, {"boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4), "labels": labels}


def found(image, label):
    """The bounding box of a label's brightness."""
    rows, columns = torch.nonzero(image[0] == 50 + 50 * label, as_tuple=True)
    ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return torch.tensor([int(end) for end in ends], dtype=torch.float32)


def changed(config, seed=0, index=0, samples=None):
    samples = samples or [sample(number) for number in range(4)]
    return Augmentation(AugmentationConfig(**{**OFF, **config}), SIZE)(
        samples.__getitem__, index, count=len(samples), seed=seed
    )


@pytest.mark.parametrize("change", [flip, flip_vertically])
def test_mirrored_boxes_are_exact(change):
    image, target = sample()
    new, mirrored = change(image, target)
    for box, label in zip(mirrored["boxes"], mirrored["labels"].tolist(), strict=True):
        assert torch.equal(box, found(new, label))
    back, again = change(new, mirrored)
    assert torch.equal(back, image)
    assert torch.equal(again["boxes"], target["boxes"])


@pytest.mark.parametrize("seed", range(4, 12))
def test_zoomed_out_boxes_bound_their_objects(seed):
    torch.manual_seed(seed)
    image, target = zoom_out(*sample(seed), largest=2.0)
    assert image.shape == (3, HEIGHT, WIDTH)
    for box, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
        assert (box - found(image, label)).abs().max() <= 1.5  # edges are blurred, and solid pixels are counted
    grey = torch.tensor(GREY, dtype=torch.uint8)
    assert (image == grey[:, None, None]).all(dim=0).any()


@pytest.mark.parametrize("seed", range(8))
def test_cropped_boxes_bound_what_is_left(seed):
    torch.manual_seed(seed)
    image, target = Augmentation(AugmentationConfig(), SIZE)._cropped(*sample(seed))
    assert len(target["boxes"]) > 0
    for box, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
        assert torch.equal(box, found(image, label))


@pytest.mark.parametrize("seed", range(8))
def test_a_mosaics_boxes_bound_their_objects(seed):
    torch.manual_seed(seed)
    image, target = mosaic([sample(number, boxes=1) for number in range(seed, seed + 4)])
    assert image.shape == (3, HEIGHT, WIDTH)
    boxes = target["boxes"]
    assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= WIDTH).all()
    assert (boxes[:, [1, 3]] <= HEIGHT).all()
    inside = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.tolist():
        part = image[0, int(y1) + 1 : int(y2) - 1, int(x1) + 1 : int(x2) - 1]
        assert (part > 50).float().mean() > 0.9 if part.numel() else True
        inside[max(int(y1) - 1, 0) : int(y2) + 2, max(int(x1) - 1, 0) : int(x2) + 2] = True
    # Bright pixels outside of all boxes are the rest of dropped ones: less than a quarter of a box each.
    assert int(((image[0] > 50) & ~inside).sum()) < 4 * 0.25 * 28 * 28


def test_a_line_has_no_mosaic():
    line = (torch.zeros(3, 1, 50, dtype=torch.uint8), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()})
    assert mosaic([line] * 4) == line


def test_boxes_are_dropped_by_the_rule():
    boxes = torch.tensor([[0, 0, 20, 20], [0, 0, 20, 20], [0, 0, 4, 0.5], [30, 30, 40, 40]]).float()
    clipped = torch.tensor([[0, 0, 20, 5], [0, 0, 20, 4.9], [0, 0, 4, 0.5], [30, 30, 40, 40]])
    left = kept({"boxes": boxes, "labels": torch.arange(1, 5)}, clipped)
    assert left["labels"].tolist() == [1, 4]  # a quarter is enough; less is not; half a pixel is not seen
    assert torch.equal(left["boxes"], clipped[[0, 3]])


def with_masks(seed=0, boxes=2):
    """The same with each object's mask: it is where the object's brightness is."""
    image, target = sample(seed, boxes)
    target["masks"] = torch.stack([image[0] == 50 + 50 * label for label in range(1, boxes + 1)]).byte()
    return image, target


def follows(image, target, seed):
    """Assert that each mask covers just its object's pixels, which are blurred at the edges; one object a label."""
    within(image, target, seed)
    for mask, label in zip(target["masks"].bool(), target["labels"].tolist(), strict=True):
        missed = (image[0] == 50 + 50 * label) & ~mask
        assert missed.sum() <= 0.12 * mask.sum(), seed  # a mixture of pixels may look solid


def within(image, target, seed):
    """Assert that each mask covers bright pixels, and its box."""
    assert target["masks"].shape == (len(target["boxes"]), *image.shape[-2:]), seed
    assert target["masks"].dtype == torch.uint8
    for mask, box in zip(target["masks"].bool(), target["boxes"], strict=True):
        assert (image[0][mask] > 20).float().mean() > 0.9, seed
        rows, columns = torch.nonzero(mask, as_tuple=True)
        ends = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (ends - box).abs().max() <= 1, seed


@pytest.mark.parametrize(
    "config",
    [
        {"horizontal_flip": 1},
        {"vertical_flip": 1},
        {"zoom_out": 1, "zoom_out_largest": 2.5},
        {"iou_crop": 1},
        {"scale_min": 0.6, "scale_max": 2},
        {"iou_crop": 0.5, "zoom_out": 0.3, "zoom_out_largest": 2, "horizontal_flip": 0.5, "vertical_flip": 0.5},
    ],
    ids=lambda config: "-".join(config),
)
def test_masks_stay_on_their_objects(config):
    for seed in range(12):
        image, target = changed(config, seed=seed, samples=[with_masks(seed)])
        follows(image, target, seed)
        plain, boxes = changed(config, seed=seed, samples=[sample(seed)])
        assert torch.equal(image, plain)  # the same draws
        assert torch.equal(target["boxes"], boxes["boxes"])
        assert torch.equal(target["labels"], boxes["labels"])


def test_a_mosaics_masks_are_each_in_its_quarter():
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = mosaic([with_masks(number, boxes=1) for number in range(seed, seed + 4)])
        within(image, target, seed)
        torch.manual_seed(seed)
        plain, boxes = mosaic([sample(number, boxes=1) for number in range(seed, seed + 4)])
        assert torch.equal(image, plain)
        assert torch.equal(target["boxes"], boxes["boxes"])
        assert (target["masks"].sum(dim=0) <= 1).all()


def test_dropped_boxes_masks_go_with_them():
    boxes = torch.tensor([[0, 0, 20, 20], [0, 0, 20, 20], [30, 30, 40, 40]]).float()
    clipped = torch.tensor([[0, 0, 20, 5], [0, 0, 20, 4.9], [30, 30, 40, 40]])
    masks = torch.arange(3, dtype=torch.uint8)[:, None, None].repeat(1, 2, 2)
    left = kept({"boxes": boxes, "labels": torch.arange(1, 4), "masks": masks}, clipped)
    assert left["masks"][:, 0, 0].tolist() == [0, 2]


def test_a_image_without_boxes_has_no_masks_at_any_size():
    empty = sample(boxes=0)
    empty[1]["masks"] = torch.zeros(0, HEIGHT, WIDTH, dtype=torch.uint8)
    for seed in range(6):
        image, target = changed(ALL, seed=seed, samples=[empty])
        assert target["masks"].shape == (0, *image.shape[-2:])


ALL = {
    "mosaic": 0.5,
    "zoom_out": 0.5,
    "iou_crop": 0.5,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "scale_min": 0.5,
    "scale_max": 1.5,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.1,
}


def test_changes_follow_from_seed_and_index_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [changed(ALL, seed=seed, index=index) for seed in (1, 100) for index in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(17)
    again = [changed(ALL, seed=seed, index=index) for seed in (1, 100) for index in reversed(range(4))]
    for (image, target), (same, alike) in zip(first, again[3::-1] + again[:3:-1], strict=True):
        assert torch.equal(image, same)
        assert torch.equal(target["boxes"], alike["boxes"])
    assert len({tuple(image.shape) for image, _ in first}) > 4  # sizes vary


def test_the_generator_is_restored_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError(torch.rand(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["mosaic", "zoom_out", "iou_crop", "horizontal_flip", "vertical_flip"])
def test_each_change_happens_when_it_is_certain_and_never_when_it_is_off(name):
    plain, target = changed({})
    assert torch.equal(plain, sample()[0])
    assert torch.equal(target["boxes"], sample()[1]["boxes"])
    assert any(not torch.equal(changed({name: 1}, seed=seed)[0], plain) for seed in range(5))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_change_and_boxes_do_not(name):
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    _, target = sample()
    new, same = changed({name: 0.3}, samples=[(image, target)])
    assert new.shape == image.shape
    assert not torch.equal(new, image)
    assert torch.equal(same["boxes"], target["boxes"])


def test_scales_stay_in_their_range_and_fill_it():
    heights = [changed({"scale_min": 0.5, "scale_max": 2.0}, seed=seed)[0].shape[-2] for seed in range(60)]
    assert 30 <= min(heights) < 40
    assert 105 < max(heights) <= 120


def test_the_smallest_scale_cannot_be_the_larger_one():
    with pytest.raises(RunError, match=r"scale_min: it must be at most scale_max, which is 0.5; got 1.0"):
        AugmentationConfig.parse({"scale_max": 0.5}, where="augmentation")


@pytest.mark.parametrize("name", ["mosaic", "zoom_out", "iou_crop", "horizontal_flip", "vertical_flip"])
def test_a_image_without_boxes_stays_one(name):
    for seed in range(4):
        image, target = changed({name: 1}, seed=seed, samples=[sample(boxes=0)])
        assert image.shape == (3, HEIGHT, WIDTH)
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == (0,)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
