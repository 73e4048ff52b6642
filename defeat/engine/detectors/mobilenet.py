"""The pyramid that torchvision's Faster R-CNN has on MobileNetV3: of two outputs of the backbone, both of stride 32."""

from collections import OrderedDict
from typing import Any, Final, cast
from urllib.error import URLError

import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from defeat.engine.detectors.backbones import weights_unavailable
from defeat.engine.detectors.frozen_norm import FrozenBatchNorm

BACKBONE = "torchvision/mobilenet_v3_large"
STRIDE: Final = 32


class MobileNetPyramid(nn.Module):
    """MobileNetV3 Large and an FPN on its last strided block and its last layer. Parameter names are torchvision's.

    Attributes:
        strides: the stride of each level in pixels: 32 twice, and 64 with the pool level.
        channels: the channels of each level, all equally many.
        out_channels: how many that is; torchvision's families ask for it.
    """

    def __init__(
        self, out_channels: int, *, pool_level: bool, pretrained: bool, frozen_batch_norm: bool, batch_norm: bool
    ) -> None:
        """Build the pyramid.

        Args:
            out_channels: channels of each level.
            pool_level: add a level of stride 64 by subsampling.
            pretrained: load ImageNet weights, from the local cache or the network.
            frozen_batch_norm: replace the backbone's batch norm by its frozen form.
            batch_norm: put batch norm behind each convolution of the pyramid; never frozen.

        Raises:
            RunError: `weights_unavailable` if the ImageNet weights cannot be had.
        """
        super().__init__()
        try:
            net: Any = torchvision.models.mobilenet_v3_large(
                weights="DEFAULT" if pretrained else None, norm_layer=FrozenBatchNorm if frozen_batch_norm else None
            )
        except (URLError, OSError) as error:
            if not pretrained:
                raise
            raise weights_unavailable(BACKBONE, error) from error
        blocks = net.features
        strided = max(index for index, block in enumerate(blocks) if getattr(block, "_is_cn", False))
        last = len(blocks) - 1
        self.body = IntermediateLayerGetter(blocks, {str(strided): "0", str(last): "1"})
        self.fpn = FeaturePyramidNetwork(
            [blocks[strided].out_channels, blocks[last].out_channels],
            out_channels,
            extra_blocks=LastLevelMaxPool() if pool_level else None,
            norm_layer=nn.BatchNorm2d if batch_norm else None,
        )
        self.strides = (STRIDE, STRIDE, 2 * STRIDE) if pool_level else (STRIDE, STRIDE)
        self.channels = (out_channels,) * len(self.strides)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> `out_channels` maps named "0", "1" (and "pool")."""
        return cast(OrderedDict[str, Tensor], self.fpn(self.body(images)))
