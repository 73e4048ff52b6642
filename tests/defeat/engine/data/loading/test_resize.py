"""Resizing beforehand against what the detectors' own transform does."""

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.detection.transform import resize_boxes as torchvisions

from defeat.engine import detectors
from defeat.engine.data.loading.resize import (
    InputSize,
    disable_training_resize,
    resize,
    resize_boxes,
    resize_masks,
    resize_target,
)
from tests.support.training import CLASSES, TINY, images_and_targets

RULES = [(64, 96), (800, 1333), (320, 320), (600, 1000), (333, 701)]


@pytest.mark.parametrize(("min_size", "max_size"), RULES)
def test_the_size_is_the_transforms(min_size, max_size):
    transform = GeneralizedRCNNTransform(min_size, max_size, [0.0], [1.0]).eval()
    generator = torch.Generator().manual_seed(min_size)
    for height, width in torch.randint(5, 2000, (60, 2), generator=generator).tolist():
        expected = transform.resize(torch.zeros(1, height, width))[0].shape[-2:]
        assert InputSize(min_size=min_size, max_size=max_size).for_image(height, width) == tuple(expected)


def test_a_fixed_size_is_the_transforms():
    transform = GeneralizedRCNNTransform(1, 1, [0.0], [1.0], fixed_size=(48, 32)).eval()  # width, height
    assert tuple(transform.resize(torch.zeros(1, 70, 90))[0].shape[-2:]) == (32, 48)
    assert InputSize(min_size=1, max_size=1, fixed=(32, 48)).for_image(70, 90) == (32, 48)


def test_scale_multiplies_both_bounds():
    rule = InputSize(min_size=100, max_size=150)
    assert rule.for_image(100, 120, scale=1.5) == (150, 180)
    assert rule.for_image(100, 300, scale=0.5) == (25, 75)
    assert rule.for_image(2, 3000) == (1, 150)  # never nothing


@pytest.mark.parametrize("size", [(40, 60), (97, 130), (64, 96)])
def test_pixels_are_the_transforms_but_for_rounding(size):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    ours = resize(image, size)
    assert ours.shape == (3, *size)
    assert ours.is_contiguous()
    assert (ours.float() - exact).abs().max() <= 1.01  # two passes, each rounded to bytes
    assert torch.equal(resize(image, (64, 96)), image)


def test_boxes_are_the_transforms():
    boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) * 60
    expected = torchvisions(boxes, [64, 96], [533, 800])
    torch.testing.assert_close(resize_boxes(boxes, (64, 96), (533, 800)), expected, rtol=1e-6, atol=0)
    assert resize_boxes(boxes[:0], (64, 96), (533, 800)).shape == (0, 4)


@pytest.mark.parametrize("size", [(40, 60), (97, 130), (128, 192), (16, 24)])
def test_a_masks_pixel_is_the_one_under_its_centre(size):
    masks = torch.randint(0, 2, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = resize_masks(masks, size)
    assert seen.shape == (3, *size)
    sides = list(zip((64, 96), size, strict=True))
    rows, columns = ([int((at + 0.5) * old / new) for at in range(new)] for old, new in sides)
    assert torch.equal(seen, masks[:, rows][:, :, columns])
    assert resize_masks(masks[:0], size).shape == (0, *size)
    assert resize_masks(masks, (64, 96)) is masks


def test_a_target_has_masks_afterwards_if_it_had_some():
    boxes, labels = torch.tensor([[8.0, 4, 40, 20]]), torch.tensor([1])
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 4:20, 8:40] = 1
    larger = resize_target({"boxes": boxes, "labels": labels, "masks": masks}, (64, 96), (96, 192))
    assert larger["boxes"].tolist() == [[16, 6, 80, 30]]
    assert larger["masks"].shape == (1, 96, 192)
    assert int(larger["masks"].sum()) == int(larger["masks"][:, 6:30, 16:80].sum()) == 24 * 64
    assert resize_target({"boxes": boxes, "labels": labels}, (64, 96), (96, 192)).keys() == {"boxes", "labels"}


def test_a_detector_trains_on_images_as_they_come_and_detects_at_its_own_size():
    torch.manual_seed(0)
    detector = detectors.build(TINY, CLASSES)
    assert InputSize.from_detector(detector) == InputSize(min_size=TINY["min_size"], max_size=TINY["max_size"])
    images, targets = images_and_targets()
    assert detector.train().forward_train(images, targets).image_sizes != [image.shape[-2:] for image in images]
    disable_training_resize(detector)
    seen = detector.train().forward_train(images, targets)
    assert seen.image_sizes == [tuple(image.shape[-2:]) for image in images]
    assert all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(seen.targets, targets, strict=True))
    batch, _ = detector.eval().transform(images)
    rule = InputSize(min_size=TINY["min_size"], max_size=TINY["max_size"])
    assert batch.image_sizes == [rule.for_image(*image.shape[-2:]) for image in images]
