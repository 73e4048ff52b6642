"""FCOS on a feature pyramid: torchvision's model, with its forward pass open to distillation."""

from collections.abc import Sequence
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor
from torchvision.models.detection import FCOS, FCOS_ResNet50_FPN_Weights

from defeat.engine.detectors.base import Part, Target
from defeat.engine.detectors.config import MaxDetections, NmsThreshold, ScoreThreshold, decides
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.one_stage import OneStageConfig, SigmoidDetector
from defeat.engine.detectors.precision import WideAnchors
from defeat.rules.anchors import AnchorSizes

ANCHORS = AnchorSizes()


class FCOSConfig(OneStageConfig):
    """An FCOS. The defaults are torchvision's `fcos_resnet50_fpn`, except the backbone."""

    architecture: Literal["fcos"] = "fcos"
    pyramid_channels: Annotated[
        int,
        Field(
            description="Channels of every pyramid level; a multiple of 32.",
            ge=32,
            le=1024,
            multiple_of=32,
            json_schema_extra=decides("channels", "tensors"),
        ),
    ] = 256
    anchor_scale: Annotated[
        float,
        Field(
            description="Side of a level's reference box, as a multiple of its stride. A cell learns objects whose "
            "farthest border is 4 to 8 sides away; on the finest level also nearer, on the coarsest also farther.",
            ge=0.5,
            le=64,
            json_schema_extra=decides("anchors"),
        ),
    ] = 1.0
    center_radius: Annotated[
        float,
        Field(
            description="Maximum distance of a cell from the centre of an object that it learns, in sides.", gt=0, le=64
        ),
    ] = 1.5
    score_threshold: ScoreThreshold = 0.2
    nms_threshold: NmsThreshold = 0.6
    max_detections: MaxDetections = 100


class FCOSDetector(SigmoidDetector, FCOS):
    """torchvision's FCOS (same parameters, same names), rebuilt from a config. See `Detector`, and `one_stage`."""

    provides: tuple[Part, ...] = ("backbone", "logits")

    def __init__(self, config: FCOSConfig, classes: Sequence[str], *, pretrained_backbone: bool = False) -> None:
        """Build the detector with random weights, or with an ImageNet backbone."""
        pyramid = config.build_pyramid(config.extra_levels, pretrained=pretrained_backbone)
        anchors = WideAnchors(
            sizes=tuple(ANCHORS.of(dict(config), stride) for stride in pyramid.strides),
            aspect_ratios=((1.0,),) * len(pyramid.strides),
        )
        super().__init__(
            pyramid,
            len(classes) + 1,
            min_size=config.min_size,
            max_size=config.max_size,
            anchor_generator=anchors,
            center_sampling_radius=config.center_radius,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
            topk_candidates=config.candidates,
        )
        self.introduce(config, classes, strides=pyramid.strides, channels=pyramid.channels)

    def match_and_compare(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], levels: list[Tensor]
    ) -> dict[str, Tensor]:
        """See `OneStageDetector.match_and_compare`: `classification`, `bbox_regression` and `bbox_ctrness`."""
        cells = [level.shape[-2] * level.shape[-1] for level in levels]
        return cast(dict[str, Tensor], self.compute_loss(targets, outputs, anchors, cells))


FAMILY = Family(
    summary="One-stage detector on a feature pyramid, without anchors (Tian et al. 2019), torchvision's.",
    config=FCOSConfig,
    detector=FCOSDetector,
    anchors=ANCHORS,
    published={
        "fcos_resnet50_fpn": Published(
            # torchvision leaves the epsilon alone when it loads these.
            config=FCOSConfig(backbone="torchvision/resnet50", frozen_batch_norm=True),
            weights={"COCO_V1": FCOS_ResNet50_FPN_Weights.COCO_V1},
        ),
    },
)
