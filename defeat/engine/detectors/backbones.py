"""Backbones and the feature pyramid (FPN) on top of them.

A backbone's name starts with its library: `torchvision/resnet50`, `timm/mobilenetv3_small_050`. A test builds and runs
each of the lists; to add a backbone, add a line.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from defeat.engine.detectors.frozen_norm import freeze_batch_norm
from defeat.engine.report import RunError

STRIDES = (4, 8, 16, 32)
LAYER_NORM_EPSILON = 1e-6  # ConvNeXt's

ExtraLevels = Literal["none", "pool", "p6p7", "p6p7_backbone"]


@dataclass(frozen=True, kw_only=True)
class ExtraLevel:
    """Levels that a pyramid has above the coarsest of the backbone's.

    Attributes:
        factors: their strides, as multiples of the coarsest one.
        convolves: whose coarsest map the first of their convolutions takes in; None where they have none.
    """

    factors: tuple[int, ...] = ()
    convolves: Literal["pyramid", "backbone"] | None = None


# `pool` subsamples the pyramid's coarsest map, the others convolve it, or the backbone's, at stride 2.
EXTRA_LEVELS: dict[ExtraLevels, ExtraLevel] = {
    "none": ExtraLevel(),
    "pool": ExtraLevel(factors=(2,)),
    "p6p7": ExtraLevel(factors=(2, 4), convolves="pyramid"),
    "p6p7_backbone": ExtraLevel(factors=(2, 4), convolves="backbone"),
}


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Where a torchvision network's stages end, stride by stride.

    Attributes:
        ends: the child modules whose outputs are the last of strides 4, 8, 16 and 32: the deepest of their stage, as
            Lin et al. 2017 ("Feature Pyramid Networks for Object Detection", section 3) take them. What a network has
            behind its last stage for the sake of classification (MobileNet's and EfficientNet's widest 1x1
            convolution) is left out.
        channels: the channels of these outputs.
        layer_norm: whether the network normalises inside its residual branches only. Each output then gets a layer norm
            of its own, as the authors do in detection (Liu et al. 2021 for Swin, 2022 for ConvNeXt).
        channels_last: whether maps are (B, H, W, C).
    """

    ends: tuple[str, str, str, str]
    channels: tuple[int, int, int, int]
    layer_norm: bool = False
    channels_last: bool = False


def _resnet(widest: int) -> Stages:
    return Stages(
        ends=("layer1", "layer2", "layer3", "layer4"), channels=(widest // 8, widest // 4, widest // 2, widest)
    )


def _regnet(*channels: int) -> Stages:
    first, second, third, fourth = channels
    return Stages(ends=("block1", "block2", "block3", "block4"), channels=(first, second, third, fourth))


def _convnext(width: int) -> Stages:
    return Stages(ends=("1", "3", "5", "7"), channels=(width, 2 * width, 4 * width, 8 * width), layer_norm=True)


def _swin(width: int) -> Stages:
    return replace(_convnext(width), channels_last=True)


TORCHVISION_BACKBONES: dict[str, Stages] = {
    "resnet18": _resnet(512),
    "resnet34": _resnet(512),
    "resnet50": _resnet(2048),
    "resnet101": _resnet(2048),
    "resnet152": _resnet(2048),
    "resnext50_32x4d": _resnet(2048),
    "resnext101_32x8d": _resnet(2048),
    "resnext101_64x4d": _resnet(2048),
    "wide_resnet50_2": _resnet(2048),
    "wide_resnet101_2": _resnet(2048),
    "mobilenet_v2": Stages(ends=("3", "6", "13", "17"), channels=(24, 32, 96, 320)),
    "mobilenet_v3_small": Stages(ends=("1", "3", "8", "11"), channels=(16, 24, 48, 96)),
    "mobilenet_v3_large": Stages(ends=("3", "6", "12", "15"), channels=(24, 40, 112, 160)),
    "efficientnet_b0": Stages(ends=("2", "3", "5", "7"), channels=(24, 40, 112, 320)),
    "efficientnet_b1": Stages(ends=("2", "3", "5", "7"), channels=(24, 40, 112, 320)),
    "efficientnet_b2": Stages(ends=("2", "3", "5", "7"), channels=(24, 48, 120, 352)),
    "efficientnet_b3": Stages(ends=("2", "3", "5", "7"), channels=(32, 48, 136, 384)),
    "efficientnet_v2_s": Stages(ends=("2", "3", "5", "6"), channels=(48, 64, 160, 256)),
    "regnet_x_400mf": _regnet(32, 64, 160, 400),
    "regnet_x_800mf": _regnet(64, 128, 288, 672),
    "regnet_x_1_6gf": _regnet(72, 168, 408, 912),
    "regnet_x_3_2gf": _regnet(96, 192, 432, 1008),
    "regnet_x_8gf": _regnet(80, 240, 720, 1920),
    "regnet_y_400mf": _regnet(48, 104, 208, 440),
    "regnet_y_800mf": _regnet(64, 144, 320, 784),
    "regnet_y_1_6gf": _regnet(48, 120, 336, 888),
    "regnet_y_3_2gf": _regnet(72, 216, 576, 1512),
    "regnet_y_8gf": _regnet(224, 448, 896, 2016),
    "convnext_tiny": _convnext(96),
    "convnext_small": _convnext(96),
    "convnext_base": _convnext(128),
    "convnext_large": _convnext(192),
    "swin_t": _swin(96),
    "swin_s": _swin(96),
    "swin_b": _swin(128),
    "swin_v2_t": _swin(96),
    "swin_v2_s": _swin(96),
    "swin_v2_b": _swin(128),
}
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
    "resnet18",
    "resnet18d",
    "resnet26t",
    "resnet34",
    "resnet50",
    "resnet50d",
    "semnasnet_075",
    "tinynet_e",
)
BACKBONES: tuple[str, ...] = tuple(
    [f"torchvision/{name}" for name in TORCHVISION_BACKBONES] + [f"timm/{name}" for name in TIMM_BACKBONES]
)


class TimmBody(nn.Module):
    """A timm `features_only` network whose maps come named "0", "1", … from the finest stride on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> one (B, C_i, H / stride_i, W / stride_i) a level."""
        return OrderedDict((str(level), features) for level, features in enumerate(self.net(images)))


class NormalisedBody(nn.Module):
    """A torchvision network with a layer norm over the channels of each output, and maps (B, C, H, W) in any case."""

    def __init__(self, net: nn.Module, channels: Sequence[int], *, channels_last: bool) -> None:
        super().__init__()
        self.net = net
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=LAYER_NORM_EPSILON) for width in channels)
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> one (B, C_i, H / stride_i, W / stride_i) a level."""
        maps = self.net(images)
        if self.channels_last:
            maps = {name: features.permute(0, 3, 1, 2) for name, features in maps.items()}
        normed = zip(self.norms, maps.items(), strict=True)
        return OrderedDict((name, norm(features)) for norm, (name, features) in normed)


@dataclass(frozen=True, kw_only=True)
class Body:
    """A backbone, cut off after the last of the wanted stages.

    Attributes:
        module: (B, 3, H, W) -> one map a level, named "0", "1", …, finest first.
        channels: the channels of these maps.
        ends: the names inside `module` of the modules that end the stages of strides 4, 8, … up to the coarsest level,
            also of those that are no level.
    """

    module: nn.Module
    channels: list[int]
    ends: list[str]


class Pyramid(nn.Module):
    """Backbone and FPN. Parameter names are torchvision's (`body`, `fpn`), so its released weights fit.

    Attributes:
        strides: the stride of each level in pixels, extra levels too, finest first.
        channels: the channels of each level, likewise: all equally many.
        out_channels: that number, under the name that torchvision's families read.
    """

    def __init__(
        self,
        body: Body,
        out_channels: int,
        *,
        strides: Sequence[int],
        extra_levels: ExtraLevels,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        blocks = _extra_blocks(extra_levels, body.channels[-1], out_channels)
        self.body = body.module
        self.fpn = FeaturePyramidNetwork(
            body.channels, out_channels, extra_blocks=blocks, norm_layer=nn.BatchNorm2d if batch_norm else None
        )
        self.strides = (*strides, *(factor * strides[-1] for factor in EXTRA_LEVELS[extra_levels].factors))
        self.channels = (out_channels,) * len(self.strides)
        self.out_channels = out_channels
        self._ends = body.ends
        self._frozen = 0  # stages

    def freeze(self, stages: int) -> None:
        """Freeze the first stages of the backbone: their parameters take no gradient, and they stay in eval mode.

        Stage 1 is the stem and everything up to stride 4, stages 2, 3 and 4 are what follows up to strides 8, 16 and
        32: `stages` are torchvision's 4 - `trainable_layers` (and its stem), and mmdetection's `frozen_stages`. Batch
        norm in a frozen stage keeps its statistics, dropout and stochastic depth are off. The pyramid's own layers, and
        the layer norm of outputs, are never frozen. There is no way back.

        Args:
            stages: 0 (nothing) to 4 (the whole backbone). The backbone ends at the coarsest stride: stages after it
                change nothing.

        Raises:
            ValueError: `stages` is out of range.
        """
        if not 0 <= stages <= len(STRIDES):
            raise ValueError(f"stages must be 0 to {len(STRIDES)}; got {stages}")
        self._frozen = max(self._frozen, min(stages, len(self._ends)))
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train(self.training)

    def _frozen_modules(self) -> list[nn.Module]:
        # Found each time: a conversion to synchronised batch norm replaces modules.
        return _up_to(self.body, self._ends[self._frozen - 1]) if self._frozen else []

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except in frozen stages."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> `out_channels` maps named "0", "1", … (and "pool", or "p6" and "p7"), finest first."""
        return cast(OrderedDict[str, Tensor], self.fpn(self.body(images)))


def _up_to(body: nn.Module, end: str) -> list[nn.Module]:
    """Return the modules of `body` up to the one named `end`, by order of registration, which is that of running."""
    found: list[nn.Module] = []
    for name, module in body.named_modules():
        if name == end:
            return [*found, module]
        if name and not end.startswith(f"{name}."):  # what holds `end` holds later modules as well
            found.append(module)
    raise AssertionError(f"no module {end!r} in {type(body).__name__}")


def _extra_blocks(extra_levels: ExtraLevels, backbone_channels: int, channels: int) -> ExtraFPNBlock | None:
    """Return the module that adds the extra levels."""
    if extra_levels == "pool":
        return LastLevelMaxPool()
    if extra_levels == "p6p7":
        # As many channels in as out: it then starts from the pyramid's coarsest level, not from the backbone's.
        return LastLevelP6P7(channels, channels)
    if extra_levels == "p6p7_backbone":
        blocks = LastLevelP6P7(backbone_channels, channels)
        blocks.use_P5 = False  # also where the backbone has as many channels as the pyramid
        return blocks
    return None


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
        extra_levels: levels to add above the coarsest, see `EXTRA_LEVELS`.
        pretrained: load ImageNet weights, from the local cache or the network.
        frozen_batch_norm: replace the backbone's batch norm by its frozen form (statistics and affine part fixed).
            Where there is none (ConvNeXt, Swin) there is nothing to replace.
        pyramid_batch_norm: put batch norm behind each convolution of the pyramid; never frozen.

    Raises:
        RunError: `unknown_backbone`; `weights_unavailable` if the ImageNet weights cannot be had.
    """
    if backbone not in BACKBONES:
        raise RunError("user", "unknown_backbone", f"unknown backbone {backbone!r}; known: {', '.join(BACKBONES)}")
    family, name = backbone.split("/")
    build_body = _torchvision_body if family == "torchvision" else _timm_body
    try:
        body = build_body(name, strides, pretrained=pretrained, frozen_batch_norm=frozen_batch_norm)
    except (URLError, OSError) as error:
        if not pretrained:
            raise
        raise weights_unavailable(backbone, error) from error
    return Pyramid(body, channels, strides=strides, extra_levels=extra_levels, batch_norm=pyramid_batch_norm)


def weights_unavailable(backbone: str, error: Exception) -> RunError:
    """Return the error for ImageNet weights that cannot be had."""
    return RunError(
        "infra",
        "weights_unavailable",
        f"ImageNet weights of {backbone} could not be downloaded ({error}); give the worker network access, put "
        "the file into its torch or Hugging Face cache, or use initial_weights: random",
    )


def _torchvision_body(name: str, strides: Sequence[int], *, pretrained: bool, frozen_batch_norm: bool) -> Body:
    stages = TORCHVISION_BACKBONES[name]
    levels = [STRIDES.index(stride) for stride in strides]
    net = _torchvision_net(name, pretrained=pretrained)
    net = freeze_batch_norm(net) if frozen_batch_norm else net
    # Keeps, and runs, nothing behind the last child that is named.
    body: nn.Module = IntermediateLayerGetter(net, {stages.ends[stage]: str(i) for i, stage in enumerate(levels)})
    channels, ends = [stages.channels[stage] for stage in levels], list(stages.ends[: levels[-1] + 1])
    if stages.layer_norm:
        body = NormalisedBody(body, channels, channels_last=stages.channels_last)
        ends = [f"net.{end}" for end in ends]
    return Body(module=body, channels=channels, ends=ends)


def _torchvision_net(name: str, *, pretrained: bool) -> nn.Module:
    """Return the network as a chain of children, the stages that `Stages.ends` names among them."""
    weights = "DEFAULT" if pretrained else None
    if not name.startswith("regnet"):
        net: Any = torchvision.models.get_model(name, weights=weights)
        return cast(nn.Module, getattr(net, "features", net))
    # torchvision works a RegNet's widths out with tensors: the meta device, where the catalog builds, has no values.
    with torch.device("cpu"):
        net = torchvision.models.get_model(name, weights=weights)
    return nn.Sequential(OrderedDict([("stem", net.stem), *net.trunk_output.named_children()])).to(
        torch.get_default_device()
    )


def _timm_body(name: str, strides: Sequence[int], *, pretrained: bool, frozen_batch_norm: bool) -> Body:
    import timm  # as long as a tenth of all other imports: not for a run that asks for none of its networks

    reductions, ends = _timm_stages(name)
    levels = [reductions.index(stride) for stride in strides]
    net: Any = timm.create_model(name, features_only=True, pretrained=pretrained, out_indices=levels)
    channels = net.feature_info.channels()
    last = net.feature_info.module_name()[-1]
    if last.startswith("blocks.") and hasattr(net, "blocks"):
        # timm's EfficientNet family keeps, and runs, the stages after the last wanted one.
        net.blocks = net.blocks[: int(last.split(".")[1]) + 1]
    return Body(
        module=TimmBody(freeze_batch_norm(net) if frozen_batch_norm else net),
        channels=channels,
        ends=[f"net.{end}" for end in ends[reductions.index(STRIDES[0]) : levels[-1] + 1]],
    )


def _timm_stages(name: str) -> tuple[list[int], list[str]]:
    """Return the strides of a timm network's stages in pixels, and the modules that end them."""
    import timm

    with torch.device("meta"):  # only for its description: no memory is filled
        net: Any = timm.create_model(name, features_only=True)
    modules = dict(net.named_modules())
    # A network that timm has flattened has `stages_0` for `stages.0`.
    names = [end if end in modules else end.replace(".", "_") for end in net.feature_info.module_name()]
    return list(net.feature_info.reduction()), names
