"""A batch as one tensor of bytes: loaded, shared between processes and copied to a GPU as a whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from defeat.engine.detectors.base import Target

Sample = tuple[Tensor, Target]

_ALIGNMENT = 64  # bytes: a cache line, and a multiple of what views of wider types need
_BITS = 8


class Part(NamedTuple):
    """One image in a batch: its shape, and where its bytes begin.

    Attributes:
        height, width: of the image, px.
        boxes: the number of boxes of its target.
        masks: whether the target has masks, one bit per pixel.
        pixels_at, boxes_at, labels_at, masks_at: offset of each in the storage, bytes.
    """

    height: int
    width: int
    boxes: int
    masks: bool
    pixels_at: int
    boxes_at: int
    labels_at: int
    masks_at: int

    @property
    def pixels(self) -> slice:
        """The image's bytes."""
        return slice(self.pixels_at, self.pixels_at + 3 * self.height * self.width)


def aligned(size: int) -> int:
    """Return `size` in bytes, rounded up to the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def to_float(image: Tensor, device: torch.device) -> Tensor:
    """(3, H, W) uint8 -> float 0 to 1 on the device: copying bytes takes a quarter of copying floats."""
    return image.to(device, non_blocking=True).float().div_(255)


def _mask_bytes(boxes: int, height: int, width: int) -> int:
    return -(-boxes * height * width // _BITS)


def max_bytes(images: int, *, pixels: int, boxes: int, masks: bool) -> int:
    """Return the maximum bytes of a batch of `images` with up to `pixels` pixels and `boxes` boxes each."""
    masked = _mask_bytes(boxes, 1, pixels) if masks else 0
    return images * sum(aligned(size) for size in (3 * pixels, 16 * boxes, 8 * boxes, masked))


def _layout(samples: Sequence[Sample]) -> tuple[tuple[Part, ...], int]:
    """Return the parts of a batch, one image after the other, and its size in bytes."""
    at, parts = 0, []
    for image, target in samples:
        height, width = image.shape[-2:]
        boxes, masks = len(target["labels"]), "masks" in target
        boxes_at = at + aligned(image.numel())
        labels_at = boxes_at + aligned(16 * boxes)
        masks_at = labels_at + aligned(8 * boxes)
        parts.append(Part(height, width, boxes, masks, at, boxes_at, labels_at, masks_at))
        at = masks_at + (aligned(_mask_bytes(boxes, height, width)) if masks else 0)
    return tuple(parts), at


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images and their ground truth, as views of one tensor of bytes.

    Attributes:
        storage: (bytes,) uint8, on any device. That of a loaded batch owns exactly the batch's bytes.
        parts: where each image and its target are in it, in order.
    """

    storage: Tensor
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], *, into: Tensor | None = None) -> "Batch":
        """Copy images, (3, H_i, W_i) uint8, and their targets into one batch; all on the CPU.

        Args:
            samples: one or more.
            into: (bytes,) uint8, whose beginning becomes the batch's storage; None: allocate memory.

        Raises:
            ValueError: `into` is too small.
        """
        parts, size = _layout(samples)
        if into is not None and len(into) < size:
            raise ValueError(
                f"a batch of {len(samples)} images takes {size} bytes, and {len(into)} were reserved for it"
            )
        storage = torch.empty(size, dtype=torch.uint8) if into is None else into[:size]
        batch = cls(storage=storage, parts=parts)
        for (image, target), part in zip(samples, parts, strict=True):
            storage[part.pixels].view(image.shape).copy_(image)
            batch._boxes(part).copy_(target["boxes"])
            batch._labels(part).copy_(target["labels"])
            if part.masks:
                batch._mask_bits(part).copy_(_packed(target["masks"]))
        return batch

    def __len__(self) -> int:
        return len(self.parts)

    def _boxes(self, part: Part) -> Tensor:
        end = part.boxes_at + 16 * part.boxes
        return self.storage[part.boxes_at : end].view(torch.float32).view(-1, 4)

    def _labels(self, part: Part) -> Tensor:
        return self.storage[part.labels_at : part.labels_at + 8 * part.boxes].view(torch.int64)

    def _mask_bits(self, part: Part) -> Tensor:
        return self.storage[part.masks_at : part.masks_at + _mask_bytes(part.boxes, part.height, part.width)]

    @property
    def images(self) -> list[Tensor]:
        """Views of the images, (3, H_i, W_i) uint8."""
        return [self.storage[part.pixels].view(3, part.height, part.width) for part in self.parts]

    @cached_property
    def targets(self) -> list[Target]:
        """The ground truth of each image: views of boxes and labels, and masks, unpacked."""
        targets = []
        for part in self.parts:
            target = Target(boxes=self._boxes(part), labels=self._labels(part))
            if part.masks:
                target["masks"] = _unpacked(self._mask_bits(part), (part.boxes, part.height, part.width))
            targets.append(target)
        return targets

    def floats(self) -> list[Tensor]:
        """Return the images as floats from 0 to 1, (3, H_i, W_i) each."""
        # One by one: floats of a whole batch are too large a block for a CPU's allocator to reuse.
        return [to_float(image, self.storage.device) for image in self.images]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, by one copy; from page-locked memory the CPU does not wait for it."""
        return replace(self, storage=self.storage.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory."""
        return replace(self, storage=self.storage.pin_memory())

    def split(self, count: int) -> Iterator["Batch"]:
        """Yield `count` batches of equal size, in order, on the same storage; a remainder is dropped."""
        size = len(self) // count
        for first in range(0, count * size, size):
            yield replace(self, parts=self.parts[first : first + size])


def _packed(masks: Tensor) -> Tensor:
    """Return masks (N, H, W), 0 or 1, as bits, the first one the highest bit of its byte."""
    flat = masks.flatten()
    groups = F.pad(flat, (0, -len(flat) % _BITS)).view(-1, _BITS)
    return (groups << _shifts(masks.device)).sum(dim=1, dtype=torch.uint8)


def _unpacked(bits: Tensor, shape: tuple[int, int, int]) -> Tensor:
    count, height, width = shape
    return ((bits[:, None] >> _shifts(bits.device)) & 1).flatten()[: count * height * width].view(shape)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(_BITS - 1, -1, -1, dtype=torch.uint8, device=device)
