"""RetinaNet on a feature pyramid: torchvision's model, with its forward pass open to distillation."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet, RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection.retinanet import RetinaNetHead

from defeat.engine.detectors.base import Part, Target
from defeat.engine.detectors.config import AnchorRatios, MaxDetections, NmsThreshold, ScoreThreshold, decides
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.one_stage import OneStageConfig, SigmoidDetector
from defeat.engine.detectors.precision import WideAnchors
from defeat.rules.anchors import AnchorSizes

NORM_GROUPS = 32
# Rounded down as torchvision does: its weights were trained on these.
ANCHORS = AnchorSizes(count="anchor_octaves", rounds="down")


class RetinaNetConfig(OneStageConfig):
    """A RetinaNet. The defaults are torchvision's `retinanet_resnet50_fpn`, except the backbone."""

    architecture: Literal["retinanet"] = "retinanet"
    anchor_scale: Annotated[
        float,
        Field(
            description="Side of a level's smallest anchors, as a multiple of its stride.",
            ge=0.5,
            le=64,
            json_schema_extra=decides("anchors"),
        ),
    ] = 4.0
    anchor_octaves: Annotated[
        int,
        Field(
            description="Number of anchor sizes of a level: n sizes at ratios 2^(1/n), from anchor_scale on.",
            ge=1,
            le=6,
            json_schema_extra=decides("anchors", multiplies_anchors=True),
        ),
    ] = 3
    anchor_ratios: AnchorRatios = (0.5, 1.0, 2.0)
    head_norm: Annotated[
        Literal["none", "group"],
        Field(
            description="`group`: group norm after the head's convolutions, in 32 groups, or the largest number that "
            "divides both 32 and the channels.",
            json_schema_extra=decides("tensors"),
        ),
    ] = "none"
    box_loss: Annotated[
        Literal["l1", "giou"], Field(description="Box regression loss: `l1` on the offsets, or `giou` on the boxes.")
    ] = "l1"
    score_threshold: ScoreThreshold = 0.05
    nms_threshold: NmsThreshold = 0.5
    max_detections: MaxDetections = 300


class RetinaNetDetector(SigmoidDetector, RetinaNet):
    """torchvision's RetinaNet (same parameters, same names), rebuilt from a config. See `Detector`, and `one_stage`."""

    provides: tuple[Part, ...] = ("backbone", "anchors", "logits")

    def __init__(self, config: RetinaNetConfig, classes: Sequence[str], *, pretrained_backbone: bool = False) -> None:
        """Build the detector with random weights, or with an ImageNet backbone."""
        pyramid = config.build_pyramid(config.extra_levels, pretrained=pretrained_backbone)
        anchors = WideAnchors(
            sizes=tuple(ANCHORS.of(dict(config), stride) for stride in pyramid.strides),
            aspect_ratios=(config.anchor_ratios,) * len(pyramid.strides),
        )
        groups = partial(nn.GroupNorm, math.gcd(NORM_GROUPS, config.pyramid_channels))
        head = RetinaNetHead(
            config.pyramid_channels,
            anchors.num_anchors_per_location()[0],
            len(classes) + 1,
            norm_layer=groups if config.head_norm == "group" else None,
        )
        head.regression_head._loss_type = config.box_loss
        super().__init__(
            pyramid,
            len(classes) + 1,
            min_size=config.min_size,
            max_size=config.max_size,
            anchor_generator=anchors,
            head=head,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
            topk_candidates=config.candidates,
        )
        self.introduce(config, classes, strides=pyramid.strides, channels=pyramid.channels)

    def match_and_compare(
        self,
        targets: list[Target],
        outputs: dict[str, Tensor],
        anchors: list[Tensor],
        levels: list[Tensor],  # noqa: ARG002 - RetinaNet does not match anchors by level
    ) -> dict[str, Tensor]:
        """See `OneStageDetector.match_and_compare`: `classification` and `bbox_regression`."""
        return cast(dict[str, Tensor], self.compute_loss(targets, outputs, anchors))


FAMILY = Family(
    summary="One-stage detector on a feature pyramid with the focal loss (Lin et al. 2017), torchvision's.",
    config=RetinaNetConfig,
    detector=RetinaNetDetector,
    anchors=ANCHORS,
    published={
        "retinanet_resnet50_fpn": Published(
            config=RetinaNetConfig(backbone="torchvision/resnet50", frozen_batch_norm=True, batch_norm_epsilon=0.0),
            weights={"COCO_V1": RetinaNet_ResNet50_FPN_Weights.COCO_V1},
        ),
        "retinanet_resnet50_fpn_v2": Published(
            config=RetinaNetConfig(
                backbone="torchvision/resnet50", extra_levels="p6p7_backbone", head_norm="group", box_loss="giou"
            ),
            weights={"COCO_V1": RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1},
        ),
    },
)
