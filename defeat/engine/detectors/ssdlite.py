"""SSDLite on MobileNetV3: torchvision's model, with its forward pass open to distillation.

Sandler et al., "MobileNetV2", CVPR 2018, section 6.2, and Howard et al., "Searching for MobileNetV3", ICCV 2019,
section 6.3.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal
from urllib.error import URLError

import torchvision
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import (
    SSDLite320_MobileNet_V3_Large_Weights,
    SSDLiteFeatureExtractorMobileNet,
    SSDLiteHead,
    _normal_init,
)

from defeat.engine.config import require
from defeat.engine.detectors.backbones import weights_unavailable
from defeat.engine.detectors.base import Target, TrainPass
from defeat.engine.detectors.config import MaxDetections, NmsThreshold, ScoreThreshold, decides
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.precision import WideDefaultBoxes
from defeat.engine.detectors.ssd import Candidates, SSDFamilyConfig, SSDFamilyDetector
from defeat.rules.training import batch_too_small, not_with_imagenet

ASPECT_RATIOS = [[2, 3] for _ in range(6)]


class SSDLiteConfig(SSDFamilyConfig):
    """An SSDLite. The defaults are torchvision's `ssdlite320_mobilenet_v3_large`."""

    architecture: Literal["ssdlite"] = "ssdlite"
    backbone: Annotated[
        Literal["torchvision/mobilenet_v3_large", "torchvision/mobilenet_v3_small"],
        Field(description="Backbone by name."),
    ] = "torchvision/mobilenet_v3_large"
    strides: Annotated[
        tuple[int, ...],
        Field(
            description="Strides of the levels in pixels.",
            json_schema_extra=decides("levels", enum=[[16, 32, 64, 128, 256, 512]]),
        ),
    ] = (16, 32, 64, 128, 256, 512)
    reduced_tail: Annotated[
        bool,
        Field(
            description="Halve the channels of the backbone's last stage, as in the COCO_V1 weights. Must be false "
            "with ImageNet weights, which are of the whole stage.",
            json_schema_extra=decides("channels", "tensors", not_with_imagenet=True),
        ),
    ] = True
    size: Annotated[
        int,
        Field(
            description="Side of the square that each image is resized to, px; a multiple of 32. Up to 512 the "
            "coarsest map is one cell, whose batch norm needs batches of 2 images or more.",
            ge=64,
            le=1024,
            multiple_of=32,
            json_schema_extra=decides("maps"),
        ),
    ] = 320
    score_threshold: ScoreThreshold = 0.001
    nms_threshold: NmsThreshold = 0.55
    max_detections: MaxDetections = 300
    candidates: Candidates = 300


class SSDLiteDetector(SSDFamilyDetector, SSD):
    """torchvision's SSDLite (same parameters, same names), rebuilt from a config. See `Detector`, and `one_stage`."""

    normalizes_coarsest_map = True

    def __init__(self, config: SSDLiteConfig, classes: Sequence[str], *, pretrained_backbone: bool = False) -> None:
        """Build the detector with random weights, or with an ImageNet backbone.

        Raises:
            RunError: `reduced_tail` if ImageNet's weights are asked for with it; `weights_unavailable` if they cannot
                be had.
        """
        norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
        backbone = _mobilenet(config, norm_layer, pretrained=pretrained_backbone)
        size = (config.size, config.size)
        channels = retrieve_out_channels(backbone, size)
        boxes = WideDefaultBoxes(ASPECT_RATIOS, min_ratio=0.2, max_ratio=0.95)
        super().__init__(
            backbone,
            boxes,
            size,
            len(classes) + 1,
            head=SSDLiteHead(channels, boxes.num_anchors_per_location(), len(classes) + 1, norm_layer),
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
            topk_candidates=config.candidates,
        )
        self.introduce(config, classes, strides=config.strides, channels=channels)

    def forward_train(self, images: list[Tensor], targets: list[Target]) -> TrainPass:
        """See `Detector.forward_train`.

        Raises:
            RunError: `batch_too_small` for one image alone whose coarsest map is one cell: it has no variance.
        """
        if len(images) < self.least_images:
            require([batch_too_small(self.trainee("detector"), 1, ("schedule",))])
        return super().forward_train(images, targets)


def _mobilenet(config: SSDLiteConfig, norm_layer: Any, *, pretrained: bool) -> nn.Module:
    """Return the backbone with SSDLite's further levels, initialised as torchvision does."""
    if pretrained and config.reduced_tail:
        require([not_with_imagenet("reduced_tail", config.backbone, ())])
    try:
        net = torchvision.models.get_model(
            config.backbone.removeprefix("torchvision/"),
            weights="DEFAULT" if pretrained else None,
            norm_layer=norm_layer,
            reduced_tail=config.reduced_tail,
        )
    except (URLError, OSError) as error:
        if not pretrained:
            raise
        raise weights_unavailable(config.backbone, error) from error
    if not pretrained:
        _normal_init(net)
    # C4, the second level, starts with the last block that halves the map.
    last_strided = max(index for index, block in enumerate(net.features) if getattr(block, "_is_cn", False))
    return SSDLiteFeatureExtractorMobileNet(net.features, last_strided, norm_layer)


FAMILY = Family(
    summary="SSD of depthwise convolutions on MobileNetV3, for phones (Howard et al. 2019), torchvision's.",
    config=SSDLiteConfig,
    detector=SSDLiteDetector,
    published={
        "ssdlite320_mobilenet_v3_large": Published(
            config=SSDLiteConfig(), weights={"COCO_V1": SSDLite320_MobileNet_V3_Large_Weights.COCO_V1}
        ),
    },
)
