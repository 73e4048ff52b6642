"""Resizing to a detector's input size, once, when an image is loaded.

torchvision's detectors resize their inputs themselves (`GeneralizedRCNNTransform`): the same image again in each epoch,
and as floats. Training resizes here instead, as bytes and before the image is cached (see `cache`), and disables the
detector's own resizing. The size follows torchvision's rule, and the interpolation is the same: bilinear without a
low-pass filter. What the network sees differs from the result of its own transform by the rounding to bytes alone.
Evaluation uses the detector's transform, on the original images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from defeat.engine.detectors.base import Detector, Target


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """The rule by which a detector's transform sizes an image.

    Attributes:
        min_size: pixels of the shorter side, unless the longer one would exceed `max_size`.
        max_size: maximum pixels of the longer side.
        fixed: height and width of every image, whatever its own; `min_size` and `max_size` then have no effect.
    """

    min_size: int
    max_size: int
    fixed: tuple[int, int] | None = None

    @classmethod
    def from_detector(cls, detector: Detector) -> Self:
        """Return the rule of a detector's own transform."""
        transform = detector.transform
        # torchvision reads the last of several min_size in evaluation.
        return cls(min_size=transform.min_size[-1], max_size=transform.max_size, fixed=detector.fixed_size)

    def for_image(self, height: int, width: int, *, scale: float = 1.0) -> tuple[int, int]:
        """Return the height and width to which torchvision's transform resizes an image, rounded in the same way.

        `scale` multiplies both bounds; a fixed size ignores it.
        """
        if self.fixed is not None:
            return self.fixed
        factor = min(self.min_size * scale / min(height, width), self.max_size * scale / max(height, width))
        return max(int(height * factor), 1), max(int(width * factor), 1)

    def max_pixels(self, *, scale: float = 1.0) -> int:
        """Return the maximum number of pixels of a resized image, over all shapes."""
        if self.fixed is not None:
            return self.fixed[0] * self.fixed[1]
        return max(int(self.min_size * scale), 1) * max(int(self.max_size * scale), 1)


def disable_training_resize(detector: Detector) -> None:
    """Let a detector's transform not resize in training mode: its images must come at its input size.

    In eval mode it resizes as before.
    """
    detector.transform._skip_resize = True  # torchvision's own switch; it holds in training mode only


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (3, H, W) uint8 to height and width as torchvision's detectors do: bilinear, not antialiased."""
    if image.shape[-2:] == size:
        return image
    # Interleaved bytes resize a third faster. Decoded files have that order, and this copies nothing then.
    interleaved = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(interleaved, size=size, mode="bilinear", align_corners=False)[0].contiguous()


def resize_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Scale boxes (N, 4), x1 y1 x2 y2, from an image of height and width `old` to one of `new`."""
    if old == new:
        return boxes
    across, down = new[1] / old[1], new[0] / old[0]
    return boxes * boxes.new_tensor([across, down, across, down])


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks (N, H, W) uint8 to height and width: each pixel takes the value at its centre.

    torchvision's transform takes the value at the pixel's upper left corner, which shifts a mask against its box and
    its image by up to half a pixel of the smaller size.
    """
    if masks.shape[-2:] == size:
        return masks
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for old, new in zip(masks.shape[-2:], size, strict=True)
    )
    # numpy's indexing, columns first, takes a third of the time of torch's interpolation.
    return torch.from_numpy(masks.numpy().take(columns, axis=2).take(rows, axis=1))


def transformed(target: Target, boxes: Tensor, transform_masks: Callable[[Tensor], Tensor]) -> Target:
    """Return a target with the boxes `boxes` (N, 4), the same labels, and its masks, if it has any, transformed."""
    new = Target(boxes=boxes, labels=target["labels"])
    if "masks" in target:
        new["masks"] = transform_masks(target["masks"])
    return new


def resize_target(target: Target, old: tuple[int, int], new: tuple[int, int]) -> Target:
    """Scale boxes and masks from an image of height and width `old` to one of `new`."""
    return transformed(target, resize_boxes(target["boxes"], old, new), lambda masks: resize_masks(masks, new))


def resize_sample(image: Tensor, target: Target, size: tuple[int, int]) -> tuple[Tensor, Target]:
    """Resize an image (3, H, W) uint8 together with its boxes and masks."""
    height, width = image.shape[-2:]
    return resize(image, size), resize_target(target, (height, width), size)
