"""Areas of detections' masks, and of their intersections with the objects of the ground truth, image by image."""

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

MASK_THRESHOLD: Final = 0.5  # probability from which a pixel belongs to a detection, as in Mask R-CNN (section 3)
_CHUNK: Final = 16  # masks held as numbers at a time, each as large as the image
_EXACT: Final = 2**24  # up to here float32 counts pixels exactly


@dataclass(frozen=True)
class MaskIntersections:
    """Those of one image, in pixels, on the CPU.

    Attributes:
        areas: (N,) of each detection's mask.
        intersections: (N, T) of each detection's mask with the object of each of the image's boxes.
    """

    areas: Tensor
    intersections: Tensor


def object_runs(box: Box, image: AnnotatedImage) -> Runs:
    """Return an object's mask; that of its box where the dataset has none."""
    if box.mask is not None:
        return from_text(box.mask)
    corners = np.array([(box.x1, box.y1), (box.x2, box.y1), (box.x2, box.y2), (box.x1, box.y2)])
    return rasterise([corners], image.height, image.width)


def object_areas(images: Sequence[AnnotatedImage]) -> np.ndarray:
    """Return the area (T,) of each object of the images in pixels, in the order of their boxes."""
    return np.array([area(object_runs(box, image)) for image in images for box in image.boxes], np.float64)


def mask_intersections(detections: Detections, image: AnnotatedImage) -> MaskIntersections:
    """Paste the detections' masks into the image and count pixels, on the detections' device."""
    size, boxes = (image.height, image.width), detections["boxes"]
    count, objects = len(boxes), len(image.boxes)
    masks = torch.zeros(count, size[0] * size[1], dtype=torch.bool, device=boxes.device)
    for rows in _chunks(count):
        pasted = paste_masks_in_image(detections["masks"][rows, None], boxes[rows], size)
        masks[rows] = pasted.flatten(1) >= MASK_THRESHOLD
    exact = torch.float32 if masks.shape[1] < _EXACT else torch.float64
    intersections = torch.zeros(count, objects, dtype=torch.float64)
    for columns in _chunks(objects):
        bitmaps = np.stack([to_bitmap(object_runs(box, image), *size) for box in image.boxes[columns]])
        truth = torch.from_numpy(bitmaps).to(boxes.device).flatten(1).to(exact)
        for rows in _chunks(count):
            intersections[rows, columns] = (masks[rows].to(exact) @ truth.T).double().cpu()
    return MaskIntersections(areas=masks.sum(dim=1).double().cpu(), intersections=intersections)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, count, _CHUNK))
