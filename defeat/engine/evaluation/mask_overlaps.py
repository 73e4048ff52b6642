"""What the masks of detections share with the objects of the ground truth, image by image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from defeat.engine.data.canonical import AnnotatedImage, Box
from defeat.engine.data.masks import Runs, area, from_text, rasterise, to_bitmap
from defeat.engine.detectors.base import Detections

LIKELY: Final = 0.5  # from which on a pixel belongs to a detection, as in Mask R-CNN's paper (section 3)
_AT_ONCE: Final = 16  # masks as numbers, each as large as the image
_EXACT: Final = 2**24  # up to here float32 counts pixels exactly


@dataclass(frozen=True)
class MaskOverlaps:
    """One image's, on the CPU.

    Attributes:
        pixels: (N,) how many each detection's mask has.
        common: (N, T) how many it shares with the object of each of the image's boxes.
    """

    pixels: Tensor
    common: Tensor


def object_runs(box: Box, image: AnnotatedImage) -> Runs:
    """Return an object's mask; its box's pixels where the dataset has none."""
    if box.mask is not None:
        return from_text(box.mask)
    corners = np.array([(box.x1, box.y1), (box.x2, box.y1), (box.x2, box.y2), (box.x1, box.y2)])
    return rasterise([corners], image.height, image.width)


def object_pixels(images: Sequence[AnnotatedImage]) -> np.ndarray:
    """Return (T,) how many pixels each object of the images has, in the order of their boxes."""
    return np.array([area(object_runs(box, image)) for image in images for box in image.boxes], np.float64)


def mask_overlaps(detections: Detections, image: AnnotatedImage) -> MaskOverlaps:
    """Spread the detections' masks over the image and count; on the device that they are on."""
    size, boxes = (image.height, image.width), detections["boxes"]
    found, objects = len(boxes), len(image.boxes)
    bits = torch.zeros(found, size[0] * size[1], dtype=torch.bool, device=boxes.device)
    for part in _parts(found):
        spread = paste_masks_in_image(detections["masks"][part, None], boxes[part], size)
        bits[part] = spread.flatten(1) >= LIKELY
    exact = torch.float32 if bits.shape[1] < _EXACT else torch.float64
    common = torch.zeros(found, objects, dtype=torch.float64)
    for columns in _parts(objects):
        truth = np.stack([to_bitmap(object_runs(box, image), *size) for box in image.boxes[columns]])
        wanted = torch.from_numpy(truth).to(boxes.device).flatten(1).to(exact)
        for part in _parts(found):
            common[part, columns] = (bits[part].to(exact) @ wanted.T).double().cpu()
    return MaskOverlaps(pixels=bits.sum(dim=1).double().cpu(), common=common)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))
