"""Pieces of torchvision's detectors without their copies to the device, each of which makes the CPU wait for the GPU.

The results are torchvision's, to the last bit.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, encode_boxes
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform


def unblock(detector: nn.Module) -> None:
    """Replace a detector's transform, and every box coder in it, by the ones here."""
    whole = cast(Any, detector)
    whole.transform = UnblockedTransform(whole.transform)
    for module in whole.modules():
        if type(getattr(module, "box_coder", None)) is BoxCoder:
            module.box_coder = UnblockedBoxCoder(module.box_coder.weights, module.box_coder.bbox_xform_clip)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made in an evaluation, it is to serve in training as well
        return torch.tensor(values, dtype=dtype, device=device)


class UnblockedTransform(GeneralizedRCNNTransform):
    """torchvision's transform: it keeps means and deviations on the device, and scales detections by plain numbers."""

    def __init__(self, given: GeneralizedRCNNTransform) -> None:
        """Take over all settings of `given`."""
        super().__init__(
            given.min_size,
            given.max_size,
            given.image_mean,
            given.image_std,
            size_divisible=given.size_divisible,
            fixed_size=given.fixed_size,
            _skip_resize=given._skip_resize,
        )

    def normalize(self, image: Tensor) -> Tensor:
        """(3, H, W), floating point -> less the mean, over the deviation of each channel.

        Raises:
            TypeError: the image is of whole numbers.
        """
        if not image.is_floating_point():
            raise TypeError(f"an image must be of floating point numbers from 0 to 1; got {image.dtype}")
        mean, std = (
            _constant(tuple(values), image.dtype, image.device) for values in (self.image_mean, self.image_std)
        )
        return (image - mean[:, None, None]) / std[:, None, None]

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Bring detections from the pixels of the resized images to those of the originals, in eval mode."""
        if self.training:
            return result
        for one, old, new in zip(result, image_shapes, original_image_sizes, strict=True):
            one["boxes"] = _resize_boxes(one["boxes"], old, new)
            if "masks" in one:
                one["masks"] = paste_masks_in_image(one["masks"], one["boxes"], new)
        return result


def _resize_boxes(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    # Divided in float32 as torchvision does, but on the CPU.
    down, across = (float(np.float32(to) / np.float32(of)) for to, of in zip(new, old, strict=True))
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack((left * across, top * down, right * across, bottom * down), dim=1)


class UnblockedBoxCoder(BoxCoder):
    """torchvision's coder of boxes as offsets from anchors: it keeps its weights on the device."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Boxes (N, 4), anchors (N, 4) -> offsets (N, 4)."""
        weights = _constant(tuple(self.weights), reference_boxes.dtype, reference_boxes.device)
        return cast(Tensor, encode_boxes(reference_boxes, proposals, weights))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Offsets (N, 4 K), anchors (N, 4) -> boxes (N, 4 K), in torchvision's operations and their order."""
        boxes = boxes.to(rel_codes.dtype)
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        centre_x, centre_y = boxes[:, 0] + 0.5 * width, boxes[:, 1] + 0.5 * height
        across, down, wider, higher = (rel_codes[:, i::4] / weight for i, weight in enumerate(self.weights))
        # Limited before they become exponents.
        wider, higher = (torch.clamp(one, max=self.bbox_xform_clip) for one in (wider, higher))
        x, y = across * width[:, None] + centre_x[:, None], down * height[:, None] + centre_y[:, None]
        half_width = 0.5 * (torch.exp(wider) * width[:, None])
        half_height = 0.5 * (torch.exp(higher) * height[:, None])
        return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=2).flatten(1)
