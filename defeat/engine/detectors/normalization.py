"""The normalisation of images, and the change from one detector's to another's."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Normalization(NamedTuple):
    """Mean and standard deviation by channel (R, G, B) of images whose values lie from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def renormalize(
    images: Tensor, image_sizes: Sequence[tuple[int, int]], *, given: Normalization, wanted: Normalization
) -> Tensor:
    """Turn a batch normalised as `given` into one normalised as `wanted`: `images` itself where the two are equal.

    A batch is padded with zeros after normalisation, and so was every batch that either detector was trained on: the
    padding stays zero, and does not become what a grey margin would.

    Args:
        images: (B, 3, H, W).
        image_sizes: height and width of each image in `images`, without the padding.
        given: the normalisation of `images`.
        wanted: the normalisation of the result.
    """
    if given == wanted:
        return images
    scale, shift = _scale_and_shift(given, wanted, images.dtype, images.device)
    renormalized = torch.zeros_like(images)
    for image, target, (height, width) in zip(images, renormalized, image_sizes, strict=True):
        target[:, :height, :width] = image[:, :height, :width] * scale + shift
    return renormalized


@lru_cache(maxsize=16)  # Else each step would copy them to the device, and wait for it.
def _scale_and_shift(
    given: Normalization, wanted: Normalization, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the factor of the values and what is then added, each (3, 1, 1)."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in given)
    wanted_mean, wanted_std = (torch.tensor(values, dtype=torch.float64) for values in wanted)
    scale, shift = std / wanted_std, (mean - wanted_mean) / wanted_std
    return scale[:, None, None].to(device, dtype), shift[:, None, None].to(device, dtype)
