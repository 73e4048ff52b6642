"""FCOS with a feature pyramid: torchvision's model, with its forward pass laid open for distillation."""

from collections.abc import Sequence
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor
from torchvision.models.detection import FCOS

from defeat.engine.detectors.base import Part, Target
from defeat.engine.detectors.config import MaxDetections, NmsThreshold, ScoreThreshold
from defeat.engine.detectors.one_stage import OneStageConfig, SigmoidDetector
from defeat.engine.detectors.precision import WideAnchors


class FCOSConfig(OneStageConfig):
    """An FCOS. The defaults are torchvision's `fcos_resnet50_fpn`, the backbone apart."""

    architecture: Literal["fcos"] = "fcos"
    pyramid_channels: Annotated[
        int, Field(description="Channels of every pyramid level; a multiple of 32.", ge=32, le=1024, multiple_of=32)
    ] = 256
    anchor_scale: Annotated[
        float,
        Field(
            description="Side of a level's reference box, as a multiple of its stride. A cell learns objects whose "
            "farthest border is 4 to 8 sides away; on the finest level nearer ones too, on the coarsest farther ones.",
            ge=0.5,
            le=64,
        ),
    ] = 1.0
    center_radius: Annotated[
        float, Field(description="Distance from an object's centre that cells learn it in, in sides.", gt=0, le=64)
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
            sizes=tuple((round(config.anchor_scale * stride),) for stride in pyramid.strides),
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
