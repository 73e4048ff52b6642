"""Data augmentation: random changes to training images.

In this order: mosaic, zoom-out, crop, flips, resizing to the detector's input size times a random scale, colour jitter.
Which changes an image gets follows from the epoch's seed and the image's index alone, not from which process loads it.

Boxes and masks are transformed with the pixels. Where a change cuts the image (mosaic, crop), a box is clipped, and
kept if a quarter of its area is left and it is one pixel or more wide and high; a crop, as in SSD, also drops boxes
whose centre is outside. An image may end without boxes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from defeat.engine.data.loading.batch import Sample
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.resize import InputSize, resize, resize_sample, resize_target, transformed
from defeat.engine.detectors.base import Target

# Minimum share of a box's area that is left after a cut, and minimum width and height in pixels.
MIN_VISIBLE = 0.25
MIN_SIDE = 1.0
# ImageNet's mean colour, zoom-out's background: 0 for the network, like its padding.
GREY = (124, 116, 104)
# The point where a mosaic's four images meet lies in the middle half of width and height.
_MOSAIC_CENTRE = (0.25, 0.75)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator, which torchvision's transforms use, and restore its state at the end.

    The generators of other devices stay as they are (`torch.manual_seed` would seed them all).
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        generator.set_state(state)


class Augmentation:
    """The changes that a config describes.

    Images are (3, H, W) uint8, boxes (N, 4) float in their pixels, and masks, in targets that have some, (N, H, W)
    uint8.
    """

    def __init__(self, config: AugmentationConfig, size: InputSize) -> None:
        self.config = config
        self.size = size
        self._crop = v2.RandomIoUCrop()
        jitter = (config.brightness, config.contrast, config.saturation, config.hue)
        self._colours = v2.ColorJitter(*jitter) if any(jitter) else None

    def __call__(self, read: Callable[[int], Sample], index: int, *, count: int, seed: int) -> Sample:
        """Return image `index` of `count`, augmented and at its final size.

        Args:
            read: returns an image and its target by index; neither is modified. Also called for a mosaic's others.
            index: the image's index.
            count: the number of images.
            seed: the epoch's seed.
        """
        with seeded(seed + index):
            mirrored = _happens(self.config.horizontal_flip)
            sample = read(index)
            if _happens(self.config.mosaic):
                others = torch.randint(count, (3,)).tolist()
                sample = mosaic([sample, *map(read, others)])
            if _happens(self.config.zoom_out):
                sample = zoom_out(*sample, largest=self.config.zoom_out_largest)
            if _happens(self.config.iou_crop):
                sample = self._cropped(*sample)
            if mirrored:
                sample = flip(*sample)
            if _happens(self.config.vertical_flip):
                sample = flip_vertically(*sample)
            image, target = self._scaled(*sample)
            if self._colours is not None:
                image = self._colours(image)
        return image, target

    def _scaled(self, image: Tensor, target: Target) -> Sample:
        least, largest = self.config.scale_min, self.config.scale_max
        scale = least if least == largest else least + (largest - least) * torch.rand(()).item()
        height, width = image.shape[-2:]
        return resize_sample(image, target, self.size.for_image(height, width, scale=scale))

    def _cropped(self, image: Tensor, target: Target) -> Sample:
        if not len(target["boxes"]):  # the crop is chosen by its overlap with boxes
            return image, target
        height, width = image.shape[-2:]
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width))
        masks = {name: tv_tensors.Mask(one) for name, one in target.items() if name == "masks"}
        cut, left, masks = self._crop(tv_tensors.Image(image), boxes, masks)
        parts = transformed(target, target["boxes"], lambda _: masks["masks"].as_subclass(Tensor))
        return cut.as_subclass(Tensor), kept(parts, left.as_subclass(Tensor))


def _happens(probability: float) -> bool:
    """Draw with a probability; with probability 0 nothing is drawn, so that the other draws stay the same."""
    return probability > 0 and torch.rand(()).item() < probability


def kept(target: Target, clipped: Tensor) -> Target:
    """Return the target with its boxes replaced by `clipped` (N, 4), without those that the module's rule drops."""
    sides, before = clipped[:, 2:] - clipped[:, :2], target["boxes"][:, 2:] - target["boxes"][:, :2]
    stays = (sides.prod(dim=1) >= MIN_VISIBLE * before.prod(dim=1)) & (sides >= MIN_SIDE).all(dim=1)
    left = transformed(target, clipped[stays], lambda masks: masks[stays])
    left["labels"] = target["labels"][stays]
    return left


def flip(image: Tensor, target: Target) -> Sample:
    """Flip an image (3, H, W), its boxes and its masks horizontally."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), transformed(target, boxes, lambda masks: masks.flip(-1))


def flip_vertically(image: Tensor, target: Target) -> Sample:
    """Flip an image (3, H, W), its boxes and its masks vertically."""
    boxes = target["boxes"].clone()
    boxes[:, [1, 3]] = image.shape[-2] - boxes[:, [3, 1]]
    return image.flip(-2), transformed(target, boxes, lambda masks: masks.flip(-2))


def zoom_out(image: Tensor, target: Target, *, largest: float) -> Sample:
    """Shrink an image by a factor of up to `largest` and place it at random on a grey canvas of the old size.

    SSD's expansion (Liu et al., "SSD", ECCV 2016, section 3.6, and torchvision's `RandomZoomOut`), without making the
    larger image: resizing to the detector's input size would shrink it again.
    """
    height, width = image.shape[-2:]
    times = 1 + (largest - 1) * torch.rand(()).item()
    size = (max(round(height / times), 1), max(round(width / times), 1))
    top, left = (int(torch.randint(room + 1, ())) for room in (height - size[0], width - size[1]))
    canvas = image.new_tensor(GREY)[:, None, None].repeat(1, height, width)
    canvas[:, top : top + size[0], left : left + size[1]] = resize(image, size)
    return canvas, _placed(resize_target(target, (height, width), size), top, left, (height, width))


def _placed(target: Target, top: int, left: int, size: tuple[int, int]) -> Target:
    """Return the target of an image that was placed at `top` and `left` of a canvas of height and width `size`."""

    def _place(masks: Tensor) -> Tensor:
        canvas = masks.new_zeros(len(masks), *size)
        canvas[:, top : top + masks.shape[-2], left : left + masks.shape[-1]] = masks
        return canvas

    boxes = target["boxes"]
    return transformed(target, boxes + boxes.new_tensor([left, top, left, top]), _place)


def mosaic(samples: list[Sample]) -> Sample:
    """Combine four images into one of the first one's size.

    The mosaic of YOLOv4 (Bochkovskiy et al., arXiv 2004.10934, section 3.3): the four meet at a random point. Each is
    resized with its aspect ratio until it covers its quarter, and cropped to the quarter at a random place.
    """
    height, width = samples[0][0].shape[-2:]
    if min(height, width) < 2:
        return samples[0]  # a line of pixels has no quarters
    low, high = _MOSAIC_CENTRE
    down, across = (
        min(max(round((low + (high - low) * share) * side), 1), side - 1)
        for share, side in zip(torch.rand(2).tolist(), (height, width), strict=True)
    )
    canvas = torch.empty(3, height, width, dtype=torch.uint8)
    targets = []
    quarters = [
        (0, down, 0, across),
        (0, down, across, width),
        (down, height, 0, across),
        (down, height, across, width),
    ]
    for place, sample in zip(torch.randperm(4).tolist(), samples, strict=True):
        y1, y2, x1, x2 = quarters[place]
        canvas[:, y1:y2, x1:x2], target = _cover(*sample, (y2 - y1, x2 - x1))
        targets.append(_placed(target, y1, x1, (height, width)))
    # All are of one dataset: all have masks, or none has.
    parts = {name: torch.cat([cast(dict[str, Tensor], one)[name] for one in targets]) for name in targets[0]}
    return canvas, cast(Target, parts)


def _cover(image: Tensor, target: Target, size: tuple[int, int]) -> Sample:
    """Resize an image until it covers `size`, and crop it to `size` at a random place."""
    height, width = image.shape[-2:]
    factor = max(size[0] / height, size[1] / width)
    large = (max(round(height * factor), size[0]), max(round(width * factor), size[1]))
    image, target = resize_sample(image, target, large)
    top, left = (int(torch.randint(room + 1, ())) for room in (large[0] - size[0], large[1] - size[1]))
    boxes = target["boxes"] - target["boxes"].new_tensor([left, top, left, top])
    bounds = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    cut = transformed(target, target["boxes"], lambda masks: masks[:, rows, columns])
    return image[:, rows, columns], kept(cut, boxes.clamp(min=0).minimum(bounds))
