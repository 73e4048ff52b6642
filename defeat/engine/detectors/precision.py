"""Where half precision ends: anchors, and what a head puts out.

Under autocast torchvision would make anchors and boxes in the precision of the features. Bfloat16 knows no pixel
between 512 and 516.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.rpn import RPNHead


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider, also under autocast: a sum of millions of squares does not fit a half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _shapes(levels: list[Tensor]) -> list[Tensor]:
    """Stand-ins for maps, of whose values nobody asks: the same shapes and device, float32 or wider, no memory."""
    return [
        level.new_empty((), dtype=torch.promote_types(level.dtype, torch.float32)).expand(level.shape)
        for level in levels
    ]


class WideAnchors(AnchorGenerator):
    """torchvision's anchors, in float32 whatever the features are in."""

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (A, 4) of each image."""
        return list(super().forward(image_list, _shapes(feature_maps)))


class WideDefaultBoxes(DefaultBoxGenerator):
    """torchvision's default boxes, likewise; made, and copied to the device, when the maps' shapes change."""

    _made: tuple[Any, Tensor] | None = None  # for what, and the boxes

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the boxes (A, 4) of each image: one and the same tensor."""
        shapes = _shapes(feature_maps)
        wanted = (image_list.tensors.shape[-2:], [(one.shape[-2:], one.dtype, one.device) for one in shapes])
        if self._made is None or self._made[0] != wanted:
            with torch.inference_mode(False):  # made in an evaluation, they are to serve in training as well
                self._made = wanted, super().forward(image_list, shapes)[0]
        return [self._made[1]] * len(image_list.image_sizes)


class WideRPNHead(RPNHead):
    """torchvision's head of the proposal network (same parameters, same names), whose outputs are float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels (B, C, H, W) -> objectness (B, A, H, W) and deltas (B, 4 A, H, W) of each."""
        objectness, deltas = super().forward(x)
        return [widened(level) for level in objectness], [widened(level) for level in deltas]
