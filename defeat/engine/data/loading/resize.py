"""To a detector's input size, once, when an image is loaded.

torchvision's detectors resize what they are given (`GeneralizedRCNNTransform`): the same image again in each epoch,
and as floats. Training resizes it here instead, as bytes and before it is kept (see `cache`), and tells the detector to
leave it as it is. The size follows torchvision's rule, and the interpolation is the same bilinear one without a
low-pass filter: what the network sees differs from its own transform's result by the rounding to bytes alone.
Evaluation is left to the detector's transform, on the original images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

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
        max_size: most pixels of the longer side.
        fixed: height and width, whatever the image's; the two above are then of no effect.
    """

    min_size: int
    max_size: int
    fixed: tuple[int, int] | None = None

    @classmethod
    def taken_from(cls, detector: Detector) -> Self:
        """Take resizing over: return the detector's rule, and let its own transform resize no more in training.

        In eval mode it goes on resizing by itself.
        """
        transform = cast(Any, detector).transform
        transform._skip_resize = True  # torchvision's own switch, for whoever resizes beforehand; training mode only
        # torchvision keeps a fixed size as width and height, and reads the last of several min_size in evaluation.
        fixed = None if transform.fixed_size is None else (transform.fixed_size[1], transform.fixed_size[0])
        return cls(min_size=transform.min_size[-1], max_size=transform.max_size, fixed=fixed)

    def of(self, height: int, width: int, *, scale: float = 1.0) -> tuple[int, int]:
        """Return the height and width to which torchvision's transform brings an image, rounded as there.

        `scale` multiplies both bounds; a fixed size knows no scale.
        """
        if self.fixed is not None:
            return self.fixed
        factor = min(self.min_size * scale / min(height, width), self.max_size * scale / max(height, width))
        return max(int(height * factor), 1), max(int(width * factor), 1)

    def most_pixels(self, *, scale: float = 1.0) -> int:
        """Return the most pixels of an image of this size, whatever its shape."""
        if self.fixed is not None:
            return self.fixed[0] * self.fixed[1]
        return max(int(self.min_size * scale), 1) * max(int(self.max_size * scale), 1)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (3, H, W) uint8 to height and width, as torchvision's detectors do it: bilinear, unfiltered."""
    if image.shape[-2:] == size:
        return image
    # Interleaved bytes resize a third faster; files decode to them, and then this copies nothing.
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

    torchvision's transform takes that at its upper left corner, which shifts a mask against its box and its image by
    up to half a pixel of the smaller size.
    """
    if masks.shape[-2:] == size:
        return masks
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for old, new in zip(masks.shape[-2:], size, strict=True)
    )
    # Picked by numpy, columns first, in a third of the time of torch's interpolation.
    return torch.from_numpy(masks.numpy().take(columns, axis=2).take(rows, axis=1))


def moved(target: Target, boxes: Tensor, move: Callable[[Tensor], Tensor]) -> Target:
    """Return a target whose boxes are now `boxes` (N, 4), its masks, if it has any, `move` of them."""
    new = Target(boxes=boxes, labels=target["labels"])
    if "masks" in target:
        new["masks"] = move(target["masks"])
    return new


def resize_target(target: Target, old: tuple[int, int], new: tuple[int, int]) -> Target:
    """Scale boxes and masks from an image of height and width `old` to one of `new`."""
    return moved(target, resize_boxes(target["boxes"], old, new), lambda masks: resize_masks(masks, new))


def resize_sample(image: Tensor, target: Target, size: tuple[int, int]) -> tuple[Tensor, Target]:
    """Resize an image (3, H, W) uint8, and its boxes and masks along."""
    height, width = image.shape[-2:]
    return resize(image, size), resize_target(target, (height, width), size)
