"""SSD on VGG-16: torchvision's model, with its forward pass open to distillation.

Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, arXiv 1512.02325.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast
from urllib.error import URLError

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torchvision.models import VGG16_Weights
from torchvision.models.detection.ssd import SSD, SSD300_VGG16_Weights, SSDFeatureExtractorVGG
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import box_iou

from defeat.engine.config import Config
from defeat.engine.detectors.backbones import weights_unavailable
from defeat.engine.detectors.base import Target
from defeat.engine.detectors.config import MaxDetections, NmsThreshold, ScoreThreshold, decides
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.one_stage import OneStageDetector
from defeat.engine.detectors.outputs import select_outputs
from defeat.engine.detectors.precision import WideDefaultBoxes

# Section 3.1 and the authors' SSD300 for COCO: box sides as shares of the image's, and aspect ratios beside 1.
SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
ASPECT_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
VGG_CHANNELS = (512, 1024, 512, 256, 256, 256)
# The VGG's last two levels come from 3x3 convolutions without padding, which need so many cells.
FIRST_UNPADDED, LEAST_CELLS = 3, 3

Candidates = Annotated[
    int,
    Field(
        description="Maximum number of boxes per class and image in detection, before non-maximum suppression.",
        ge=1,
        le=10_000,
    ),
]


class SSDFamilyConfig(Config):
    """What SSD and SSDLite have in common. They resize each image to a square, whatever its shape."""

    strides: tuple[int, ...]

    @field_validator("strides")
    @classmethod
    def _check_strides(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        only = cls.model_fields["strides"].default
        if strides != only:
            raise ValueError(f"strides are what the family has, {list(only)}; got {list(strides)}")
        return strides


class SSDConfig(SSDFamilyConfig):
    """An SSD. The defaults are torchvision's `ssd300_vgg16`."""

    architecture: Literal["ssd"] = "ssd"
    backbone: Annotated[Literal["torchvision/vgg16"], Field(description="Backbone by name.")] = "torchvision/vgg16"
    strides: Annotated[
        tuple[int, ...],
        Field(
            description="Strides of the finest levels in pixels; two more have 3 x 3 cells and 1 x 1.",
            json_schema_extra=decides("levels", enum=[[8, 16, 32, 64]]),
        ),
    ] = (8, 16, 32, 64)
    size: Annotated[
        Literal[288, 300, 320],
        Field(
            description="Side of the square that each image is resized to, px. At 300, the paper's, its maps have the "
            "shapes of those of backbones that round up, such as ResNets; at 288 and 320 of all backbones.",
            json_schema_extra=decides("maps"),
        ),
    ] = 300
    score_threshold: ScoreThreshold = 0.01
    nms_threshold: NmsThreshold = 0.45
    max_detections: MaxDetections = 200
    candidates: Candidates = 400


class SSDFamilyDetector(OneStageDetector):
    """The methods of SSD and SSDLite. Column 0 of the head is background: a softmax over it and the classes."""

    proposal_matcher: Any

    @property
    def body(self) -> nn.Module:
        """See `Detector.body`."""
        return cast(nn.Module, self.backbone.features)

    def match_and_compare(
        self,
        targets: list[Target],
        outputs: dict[str, Tensor],
        anchors: list[Tensor],
        levels: list[Tensor],  # noqa: ARG002 - SSD does not match boxes by level
    ) -> dict[str, Tensor]:
        """See `OneStageDetector.match_and_compare`: `bbox_regression` and `classification`."""
        matches = [
            self.proposal_matcher(box_iou(target["boxes"], boxes))
            if len(target["boxes"])
            else torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
            for boxes, target in zip(anchors, targets, strict=True)
        ]
        return cast(dict[str, Tensor], self.compute_loss(targets, outputs, anchors, matches))

    def select_classes(self, classes: Sequence[str]) -> None:
        """See `Detector.select_classes`. The softmax then runs over what is left: scores rise."""
        head = self.head.classification_head
        columns = torch.tensor([0] + [self.classes.index(name) + 1 for name in classes])
        for level, boxes in enumerate(self.anchor_generator.num_anchors_per_location()):
            # The outputs of a cell: every class of its first box, then of its second, …
            rows = (torch.arange(boxes)[:, None] * head.num_columns + columns).flatten()
            predictor = head.module_list[level]
            if isinstance(predictor, nn.Conv2d):
                head.module_list[level] = select_outputs(predictor, rows)
            else:  # SSDLite's: a depthwise convolution before it
                predictor[-1] = select_outputs(predictor[-1], rows)
        head.num_columns = len(columns)
        self.classes = list(classes)


class SSDDetector(SSDFamilyDetector, SSD):
    """torchvision's SSD (same parameters, same names), rebuilt from a config. See `Detector`, and `one_stage`."""

    def __init__(self, config: SSDConfig, classes: Sequence[str], *, pretrained_backbone: bool = False) -> None:
        """Build the detector with random weights, or with an ImageNet backbone."""
        # The last two levels have 3 and 1 cells a side, spread over the image: 100 and 300 px at the paper's size.
        strides = (*config.strides, config.size / 3, config.size)
        super().__init__(
            VGGPyramid(_vgg16(pretrained=pretrained_backbone), highres=False),
            WideDefaultBoxes(ASPECT_RATIOS, scales=SCALES, steps=list(strides)),
            (config.size, config.size),
            len(classes) + 1,
            # The backbone's weights come from Caffe: the mean alone is taken off, of values from 0 to 255.
            image_mean=[0.48235, 0.45882, 0.40784],
            image_std=[1 / 255, 1 / 255, 1 / 255],
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
            topk_candidates=config.candidates,
        )
        self.introduce(config, classes, strides=[round(stride) for stride in strides], channels=VGG_CHANNELS)


class VGGPyramid(SSDFeatureExtractorVGG):
    """torchvision's VGG-16 with SSD's further levels, on images of any size.

    As a teacher it may be fed small ones, of which the last two levels have no cell: they are left out then. No other
    family has levels of their strides.
    """

    out_channels = VGG_CHANNELS

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> four to six maps named "0", "1", …, finest first."""
        features = self.features(images)
        maps = [self.scale_weight.view(1, -1, 1, 1) * nn.functional.normalize(features)]
        for index, block in enumerate(self.extra):
            if index >= FIRST_UNPADDED and min(features.shape[-2:]) < LEAST_CELLS:
                break
            features = block(features)
            maps.append(features)
        return OrderedDict((str(level), one) for level, one in enumerate(maps))


def _vgg16(*, pretrained: bool) -> nn.Sequential:
    """Return VGG-16's convolutions, as torchvision initialises them or with the weights that SSD's paper starts from.

    Without the classifier, which SSD drops and which is most of the network.

    Raises:
        RunError: `weights_unavailable` if the weights cannot be had.
    """
    layers: nn.Sequential = make_layers(cfgs["D"])
    if pretrained:
        try:
            state: dict[str, Any] = dict(
                VGG16_Weights.IMAGENET1K_FEATURES.get_state_dict(progress=False, check_hash=True)
            )
        except (URLError, OSError) as error:
            raise weights_unavailable("torchvision/vgg16", error) from error
        prefix = "features."
        layers.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
        return layers
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return layers


FAMILY = Family(
    summary="One-stage detector on VGG-16 at a fixed size (Liu et al. 2016), torchvision's.",
    config=SSDConfig,
    detector=SSDDetector,
    published={"ssd300_vgg16": Published(config=SSDConfig(), weights={"COCO_V1": SSD300_VGG16_Weights.COCO_V1})},
)
