"""Detectors whose trained weights torchvision publishes, as teachers."""

from dataclasses import dataclass
from typing import Any, cast
from urllib.error import URLError

from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    FasterRCNN_MobileNet_V3_Large_FPN_Weights,
    FasterRCNN_ResNet50_FPN_V2_Weights,
    FasterRCNN_ResNet50_FPN_Weights,
    FCOS_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_Weights,
    SSD300_VGG16_Weights,
    SSDLite320_MobileNet_V3_Large_Weights,
)

from defeat.engine.config import Config
from defeat.engine.detectors import build
from defeat.engine.detectors.base import Detector
from defeat.engine.detectors.faster_rcnn import FasterRCNNConfig, FasterRCNNMobileNetConfig
from defeat.engine.detectors.fcos import FCOSConfig
from defeat.engine.detectors.mask_rcnn import MaskRCNNConfig
from defeat.engine.detectors.retinanet import RetinaNetConfig
from defeat.engine.detectors.ssd import SSDConfig
from defeat.engine.detectors.ssdlite import SSDLiteConfig
from defeat.engine.detectors.unset import Unset
from defeat.engine.report import RunError


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """One published detector: the config that its weights fit, and the weights by name."""

    config: Config
    weights: dict[str, WeightsEnum]


PRETRAINED: dict[str, Pretrained] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": Pretrained(
        config=FasterRCNNMobileNetConfig(frozen_batch_norm=True, min_size=320, max_size=640, test_proposals=150),
        weights={"COCO_V1": FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1},
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": Pretrained(
        config=FasterRCNNMobileNetConfig(frozen_batch_norm=True),
        weights={"COCO_V1": FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1},
    ),
    "fasterrcnn_resnet50_fpn": Pretrained(
        config=FasterRCNNConfig(backbone="torchvision/resnet50", frozen_batch_norm=True, batch_norm_epsilon=0.0),
        weights={"COCO_V1": FasterRCNN_ResNet50_FPN_Weights.COCO_V1},
    ),
    "fasterrcnn_resnet50_fpn_v2": Pretrained(
        config=FasterRCNNConfig(
            backbone="torchvision/resnet50", pyramid_batch_norm=True, rpn_convolutions=2, box_head="convolutional"
        ),
        weights={"COCO_V1": FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1},
    ),
    "fcos_resnet50_fpn": Pretrained(
        # torchvision leaves the epsilon alone when it loads these.
        config=FCOSConfig(backbone="torchvision/resnet50", frozen_batch_norm=True),
        weights={"COCO_V1": FCOS_ResNet50_FPN_Weights.COCO_V1},
    ),
    "maskrcnn_resnet50_fpn": Pretrained(
        config=MaskRCNNConfig(backbone="torchvision/resnet50", frozen_batch_norm=True, batch_norm_epsilon=0.0),
        weights={"COCO_V1": MaskRCNN_ResNet50_FPN_Weights.COCO_V1},
    ),
    "maskrcnn_resnet50_fpn_v2": Pretrained(
        config=MaskRCNNConfig(
            backbone="torchvision/resnet50",
            pyramid_batch_norm=True,
            rpn_convolutions=2,
            box_head="convolutional",
            mask_batch_norm=True,
        ),
        weights={"COCO_V1": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1},
    ),
    "retinanet_resnet50_fpn": Pretrained(
        config=RetinaNetConfig(backbone="torchvision/resnet50", frozen_batch_norm=True, batch_norm_epsilon=0.0),
        weights={"COCO_V1": RetinaNet_ResNet50_FPN_Weights.COCO_V1},
    ),
    "retinanet_resnet50_fpn_v2": Pretrained(
        config=RetinaNetConfig(
            backbone="torchvision/resnet50", extra_levels="p6p7_backbone", head_norm="group", box_loss="giou"
        ),
        weights={"COCO_V1": RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1},
    ),
    "ssd300_vgg16": Pretrained(config=SSDConfig(), weights={"COCO_V1": SSD300_VGG16_Weights.COCO_V1}),
    "ssdlite320_mobilenet_v3_large": Pretrained(
        config=SSDLiteConfig(), weights={"COCO_V1": SSDLite320_MobileNet_V3_Large_Weights.COCO_V1}
    ),
}


def classes_of(weights: WeightsEnum) -> list[str]:
    """Return the class names of labels 1, 2, …; torchvision's `N/A` stand for COCO's unused ids."""
    return list(weights.meta["categories"][1:])


def load_pretrained(name: str, weights_name: str) -> Detector:
    """Build a published detector and load its weights, from torch's cache or the network.

    Raises:
        RunError: `unknown_detector`, `unknown_weights` (the detail lists the choices); `weights_unavailable`.
    """
    if name not in PRETRAINED:
        raise RunError("user", "unknown_detector", f"no pretrained {name!r}; there are: {', '.join(PRETRAINED)}")
    entry = PRETRAINED[name]
    if weights_name not in entry.weights:
        raise RunError(
            "user", "unknown_weights", f"{name} has no weights {weights_name!r}; it has: {', '.join(entry.weights)}"
        )
    weights = entry.weights[weights_name]
    with Unset():
        detector = build(entry.config.model_dump(mode="json"), classes_of(weights))
    try:
        # The hash is part of the file's name and checked as it is downloaded.
        state: dict[str, Any] = cast(dict[str, Any], weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError) as error:
        raise RunError(
            "infra",
            "weights_unavailable",
            f"{name} {weights_name} could not be downloaded ({error}); give the worker network access, or put "
            f"{weights.url.rsplit('/', 1)[-1]} into hub/checkpoints under TORCH_HOME",
        ) from error
    detector.load_state_dict(state)
    return detector
