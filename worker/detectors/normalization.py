"""How pictures are normalised, and from one detector's way to another's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Normalization(NamedTuple):
    """Mean and standard deviation by channel (R, G, B) of pictures whose values lie from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Renormalization(nn.Module):
    """Turns a batch normalised as `given` into one normalised as `wanted`; nothing at all where the two are equal.

    A batch is padded with zeros after it was normalised: so was every batch that either detector was trained on, and so
    the padding is zero afterwards too, and not what a grey margin would have become.
    """

    # Not part of a state dict: they follow from the two detectors.
    scale: Tensor
    shift: Tensor

    def __init__(self, given: Normalization, wanted: Normalization) -> None:
        super().__init__()
        self.needed = given != wanted
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in given)
        wanted_mean, wanted_std = (torch.tensor(values, dtype=torch.float64) for values in wanted)
        scale, shift = std / wanted_std, (mean - wanted_mean) / wanted_std
        self.register_buffer("scale", scale[:, None, None].float(), persistent=False)
        self.register_buffer("shift", shift[:, None, None].float(), persistent=False)

    def forward(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(B, 3, H, W), and height and width of each picture without its padding -> the same shape."""
        if not self.needed:
            return images
        renormalized = torch.zeros_like(images)
        for image, target, (height, width) in zip(images, renormalized, image_sizes, strict=True):
            target[:, :height, :width] = image[:, :height, :width] * self.scale + self.shift
        return renormalized
