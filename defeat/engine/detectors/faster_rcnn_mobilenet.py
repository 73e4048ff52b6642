"""Faster R-CNN on torchvision's pyramid on MobileNetV3: of two outputs of the backbone, both of stride 32."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, cast
from urllib.error import URLError

import torchvision
from pydantic import Field, field_validator
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    FasterRCNN_MobileNet_V3_Large_FPN_Weights,
)
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from defeat.engine.detectors.backbones import weights_unavailable
from defeat.engine.detectors.base import Part
from defeat.engine.detectors.config import decides
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.faster_rcnn import ProposalThreshold, TwoStageConfig, TwoStageDetector
from defeat.engine.detectors.frozen_norm import FrozenBatchNorm
from defeat.rules.anchors import AnchorSizes

BACKBONE = "torchvision/mobilenet_v3_large"
STRIDE: Final = 32
ANCHORS = AnchorSizes(base=STRIDE, count="anchor_doublings", spread="doubling")


class MobileNetPyramid(nn.Module):
    """MobileNetV3 Large and an FPN on its last strided block and its last layer. Parameter names are torchvision's.

    Attributes:
        strides: the stride of each level in pixels: 32 twice, and 64 with the pool level.
        channels: the channels of each level, all equally many.
        out_channels: that number, under the name that torchvision's families read.
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


class FasterRCNNMobileNetConfig(TwoStageConfig):
    """A Faster R-CNN on MobileNetV3. The defaults are torchvision's `fasterrcnn_mobilenet_v3_large_fpn`."""

    architecture: Literal["faster_rcnn_mobilenet"] = "faster_rcnn_mobilenet"
    backbone: Annotated[str, Field(description="Backbone by name.", json_schema_extra={"enum": [BACKBONE]})] = BACKBONE
    strides: Annotated[
        tuple[Literal[4, 8, 16, 32], ...],
        Field(
            description="Strides of the backbone's levels in the pyramid in pixels: its last two outputs.",
            json_schema_extra=decides("levels", enum=[[STRIDE, STRIDE]]),
        ),
    ] = (STRIDE, STRIDE)
    anchor_scale: Annotated[
        float,
        Field(
            description="Side of the smallest anchors, as a multiple of 32 px.",
            gt=0,
            le=64,
            json_schema_extra=decides("anchors"),
        ),
    ] = 1.0
    anchor_doublings: Annotated[
        int,
        Field(
            description="Number of anchor sizes of every level, each twice the one before.",
            ge=1,
            le=8,
            json_schema_extra=decides("anchors", multiplies_anchors=True),
        ),
    ] = 5
    proposal_threshold: ProposalThreshold = 0.05

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, backbone: str) -> str:
        if backbone != BACKBONE:
            raise ValueError(f"the family's backbone is {BACKBONE}; got {backbone}")
        return backbone

    @field_validator("strides")
    @classmethod
    def _check_strides(cls, strides: tuple[Literal[4, 8, 16, 32], ...]) -> tuple[Literal[4, 8, 16, 32], ...]:
        if strides != (STRIDE, STRIDE):
            raise ValueError(f"strides are what the family has, {[STRIDE, STRIDE]}; got {list(strides)}")
        return strides

    def make_pyramid(self, *, pretrained: bool) -> MobileNetPyramid:
        """See `TwoStageConfig.make_pyramid`."""
        pyramid = MobileNetPyramid(
            self.pyramid_channels,
            pool_level=self.pool_level,
            pretrained=pretrained,
            frozen_batch_norm=self.frozen_batch_norm,
            batch_norm=self.pyramid_batch_norm,
        )
        if self.batch_norm_epsilon is not None:
            overwrite_eps(pyramid, self.batch_norm_epsilon)
        return pyramid

    def anchor_sizes(self, strides: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """See `TwoStageConfig.anchor_sizes`. The same on every level."""
        return tuple(ANCHORS.of(dict(self), stride) for stride in strides)


class FasterRCNNMobileNetDetector(TwoStageDetector):
    """Faster R-CNN on the pyramid that torchvision builds on MobileNetV3."""

    # Not the backbone's maps: two of them have the same stride, by which they are looked up.
    provides: tuple[Part, ...] = ("anchors", "logits")


FAMILY = Family(
    summary="Faster R-CNN on MobileNetV3 as torchvision has it: a pyramid whose finest stride is 32, twice.",
    config=FasterRCNNMobileNetConfig,
    detector=FasterRCNNMobileNetDetector,
    anchors=ANCHORS,
    published={
        "fasterrcnn_mobilenet_v3_large_320_fpn": Published(
            config=FasterRCNNMobileNetConfig(frozen_batch_norm=True, min_size=320, max_size=640, test_proposals=150),
            weights={"COCO_V1": FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1},
        ),
        "fasterrcnn_mobilenet_v3_large_fpn": Published(
            config=FasterRCNNMobileNetConfig(frozen_batch_norm=True),
            weights={"COCO_V1": FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1},
        ),
    },
)
