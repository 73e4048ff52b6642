"""Backbones and the feature pyramid (FPN) on top of them.

A backbone's name says whose it is: `torchvision/resnet50`, `timm/mobilenetv3_small_050`. The lists hold what a test has
built and run; a name is added by adding a line.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast
from urllib.error import URLError

import timm
import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from worker.report import RunError

STRIDES = (4, 8, 16, 32)

# Levels above the coarsest of the backbone's, each at twice the stride before: `pool` one by subsampling, `p6p7` two by
# strided convolutions from the pyramid's coarsest map, `p6p7_backbone` likewise from the backbone's.
ExtraLevels = Literal["none", "pool", "p6p7", "p6p7_backbone"]

TORCHVISION_RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
TIMM_BACKBONES = (
    "convnext_atto",
    "convnext_femto",
    "convnext_nano",
    "convnext_pico",
    "cspresnet50",
    "darknet53",
    "edgenext_xx_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "ghostnet_100",
    "hgnetv2_b0",
    "lcnet_050",
    "lcnet_075",
    "lcnet_100",
    "mnasnet_small",
    "mobilenetv3_large_100",
    "mobilenetv3_small_050",
    "mobilenetv3_small_075",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_medium",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "regnetx_002",
    "regnety_002",
    "regnety_004",
    "regnety_008",
    "repvgg_a0",
    "resnet10t",
    "resnet14t",
    "resnet18d",
    "resnet26t",
    "resnet50d",
    "semnasnet_075",
    "tinynet_e",
)
BACKBONES: tuple[str, ...] = tuple(
    [f"torchvision/{name}" for name in TORCHVISION_RESNETS] + [f"timm/{name}" for name in TIMM_BACKBONES]
)


class TimmBody(nn.Module):
    """A timm `features_only` network whose maps come named "0", "1", … from the finest stride on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> one (B, C_i, H / stride_i, W / stride_i) a level."""
        return OrderedDict((str(level), features) for level, features in enumerate(self.net(images)))


class Pyramid(nn.Module):
    """Backbone and FPN. Parameter names are torchvision's (`body`, `fpn`), so its released weights fit.

    Attributes:
        strides: the stride of each level in pixels, extra levels too, finest first.
        channels: the channels of each level, likewise: all equally many.
        out_channels: how many that is; torchvision's families ask for it.
    """

    def __init__(
        self,
        body: nn.Module,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        strides: Sequence[int],
        extra_levels: ExtraLevels,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        blocks, factors = _extra_blocks(extra_levels, in_channels[-1], out_channels)
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            list(in_channels), out_channels, extra_blocks=blocks, norm_layer=nn.BatchNorm2d if batch_norm else None
        )
        self.strides = (*strides, *(factor * strides[-1] for factor in factors))
        self.channels = (out_channels,) * len(self.strides)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> `out_channels` maps named "0", "1", … (and "pool", or "p6" and "p7"), finest first."""
        return cast(OrderedDict[str, Tensor], self.fpn(self.body(images)))


def _extra_blocks(
    extra_levels: ExtraLevels, backbone_channels: int, channels: int
) -> tuple[ExtraFPNBlock | None, tuple[int, ...]]:
    """Return the module that adds the extra levels, and their strides as multiples of the coarsest one."""
    if extra_levels == "pool":
        return LastLevelMaxPool(), (2,)
    if extra_levels == "p6p7":
        # As many channels in as out: it then starts from the pyramid's coarsest level, not from the backbone's.
        return LastLevelP6P7(channels, channels), (2, 4)
    if extra_levels == "p6p7_backbone":
        blocks = LastLevelP6P7(backbone_channels, channels)
        blocks.use_P5 = False  # also where the backbone has as many channels as the pyramid
        return blocks, (2, 4)
    return None, ()


def build_pyramid(
    backbone: str,
    *,
    strides: Sequence[int],
    channels: int,
    extra_levels: ExtraLevels,
    pretrained: bool,
    frozen_batch_norm: bool,
    pyramid_batch_norm: bool = False,
) -> Pyramid:
    """Build a backbone with its pyramid.

    Args:
        backbone: a name from `BACKBONES`.
        strides: consecutive strides out of 4, 8, 16, 32, in pixels.
        channels: channels of each pyramid level.
        extra_levels: levels to add above the coarsest, see `ExtraLevels`.
        pretrained: load ImageNet weights, from the local cache or the network.
        frozen_batch_norm: replace the backbone's batch norm by its frozen form (statistics and affine part fixed).
        pyramid_batch_norm: put batch norm behind each convolution of the pyramid; never frozen.

    Raises:
        RunError: `unknown_backbone`; `weights_unavailable` if the ImageNet weights cannot be had.
    """
    if backbone not in BACKBONES:
        raise RunError("user", "unknown_backbone", f"unknown backbone {backbone!r}; known: {', '.join(BACKBONES)}")
    family, name = backbone.split("/")
    build_body = _torchvision_body if family == "torchvision" else _timm_body
    try:
        body, in_channels = build_body(name, strides, pretrained=pretrained, frozen_batch_norm=frozen_batch_norm)
    except (URLError, OSError) as error:
        if not pretrained:
            raise
        raise weights_unavailable(backbone, error) from error
    return Pyramid(
        body, in_channels, channels, strides=strides, extra_levels=extra_levels, batch_norm=pyramid_batch_norm
    )


def weights_unavailable(backbone: str, error: Exception) -> RunError:
    """Return the error for ImageNet weights that cannot be had."""
    return RunError(
        "infra",
        "weights_unavailable",
        f"ImageNet weights of {backbone} could not be downloaded ({error}); give the worker network access, put "
        "the file into its torch or Hugging Face cache, or use initial_weights: random",
    )


def _torchvision_body(
    name: str, strides: Sequence[int], *, pretrained: bool, frozen_batch_norm: bool
) -> tuple[nn.Module, list[int]]:
    norm_layer = FrozenBatchNorm2d if frozen_batch_norm else nn.BatchNorm2d
    net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, norm_layer=norm_layer)
    stages = [STRIDES.index(stride) for stride in strides]
    body = IntermediateLayerGetter(net, {f"layer{stage + 1}": str(level) for level, stage in enumerate(stages)})
    return body, [net.inplanes // 8 * 2**stage for stage in stages]


def _timm_body(
    name: str, strides: Sequence[int], *, pretrained: bool, frozen_batch_norm: bool
) -> tuple[nn.Module, list[int]]:
    reductions = _timm_strides(name)
    net: Any = timm.create_model(
        name, features_only=True, pretrained=pretrained, out_indices=[reductions.index(stride) for stride in strides]
    )
    in_channels = net.feature_info.channels()
    last = net.feature_info.module_name()[-1]
    if last.startswith("blocks.") and hasattr(net, "blocks"):
        # timm's EfficientNet family keeps, and runs, the stages behind the last one that is asked for.
        net.blocks = net.blocks[: int(last.split(".")[1]) + 1]
    return TimmBody(freeze_batch_norm_2d(net) if frozen_batch_norm else net), in_channels


def _timm_strides(name: str) -> list[int]:
    net: Any = timm.create_model(name, features_only=True)
    return list(net.feature_info.reduction())
