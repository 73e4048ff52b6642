"""Mask R-CNN on a feature pyramid: torchvision's model, with its forward pass open to distillation.

He et al., "Mask R-CNN", ICCV 2017, arXiv 1703.06870.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from defeat.engine.detectors.base import Detections, Target
from defeat.engine.detectors.config import decides
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.faster_rcnn import ANCHORS, FasterRCNNDetector, TwoStageConfig
from defeat.engine.detectors.outputs import select_outputs

MASK_ROI_SIZE = 14
MASK_CONVOLUTIONS = 4


class MaskRCNNConfig(TwoStageConfig):
    """A Mask R-CNN. The defaults are torchvision's `maskrcnn_resnet50_fpn`, except the backbone."""

    architecture: Literal["mask_rcnn"] = "mask_rcnn"
    mask_channels: Annotated[
        int,
        Field(
            description="Channels of the mask head's convolutions.", ge=8, le=1024, json_schema_extra=decides("tensors")
        ),
    ] = 256
    mask_batch_norm: Annotated[
        bool, Field(description="Batch norm after the mask head's convolutions.", json_schema_extra=decides("tensors"))
    ] = False


class MaskRCNNDetector(FasterRCNNDetector):
    """torchvision's Mask R-CNN (same parameters, same names), rebuilt from a config. See `Detector`.

    A batch whose targets have no masks trains everything but the mask head, whose weights then stay as they are.
    """

    trains_masks = True
    leaves_parameters_out = True  # the mask head, where no target has masks or no proposal is positive

    def __init__(self, config: MaskRCNNConfig, classes: Sequence[str], *, pretrained_backbone: bool = False) -> None:
        """Build the detector with random weights, or with an ImageNet backbone."""
        super().__init__(config, classes, pretrained_backbone=pretrained_backbone)
        channels = config.mask_channels
        self.roi_heads.mask_roi_pool = MultiScaleRoIAlign(
            self.roi_heads.box_roi_pool.featmap_names, output_size=MASK_ROI_SIZE, sampling_ratio=2
        )
        self.roi_heads.mask_head = MaskRCNNHeads(
            config.pyramid_channels,
            [channels] * MASK_CONVOLUTIONS,
            1,
            norm_layer=nn.BatchNorm2d if config.mask_batch_norm else None,
        )
        self.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, len(classes) + 1)

    def synchronise_batch_norm(self) -> None:
        """See `Detector.synchronise_batch_norm`. The mask head's stays each process's own.

        A process whose images have no positive proposals skips that head, and the others would wait for it.
        """
        head, self.roi_heads.mask_head = self.roi_heads.mask_head, nn.Identity()
        super().synchronise_batch_norm()
        self.roi_heads.mask_head = head

    def select(
        self, proposals: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """See `FasterRCNNDetector.select`. torchvision wants masks here, which it does not look at."""
        return super().select(proposals, [{"masks": target["boxes"], **target} for target in targets])

    def further_losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        matches: list[Tensor],
        labels: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """See `FasterRCNNDetector.further_losses`: `loss_mask`, over the objects with masks.

        The mean over their positive proposals of the binary cross-entropy of the mask of the proposal's class (section
        3), torchvision's; 0 if there is no such proposal, and nothing at all if no target has `masks`.
        """
        masked = [index for index, target in enumerate(targets) if "masks" in target]
        if not masked:
            return {}
        positive = [
            _with_masks(*one) if index in masked else one[0].new_zeros(0)
            for index, one in enumerate(zip(labels, matches, targets, strict=True))
        ]
        if not sum(map(len, positive)):
            # In the graph, as any loss. The mask head is left out: its batch norm has no statistics of nothing.
            return {"loss_mask": next(iter(features.values())).sum() * 0.0}
        boxes = [one[rows] for one, rows in zip(proposals, positive, strict=True)]
        heads = self.roi_heads
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, image_sizes)))
        loss = maskrcnn_loss(
            logits,
            [boxes[index] for index in masked],
            [targets[index]["masks"] for index in masked],
            [targets[index]["labels"] for index in masked],
            [matches[index][positive[index]] for index in masked],
        )
        return {"loss_mask": loss}

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """See `Detector.detect`. The boxes of a plain call, without its time and memory for the masks."""
        return self._detect(images, with_masks=False)

    @torch.no_grad()
    def detect_with_masks(self, images: list[Tensor]) -> list[Detections]:
        """See `Detector.detect_with_masks`. A plain call's, before they are spread over whole images."""
        return self._detect(images, with_masks=True)

    def _detect(self, images: list[Tensor], *, with_masks: bool) -> list[Detections]:
        batch, _ = self.transform(images)
        features = self.features(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        logits, regression = self._head(features, proposals, batch.image_sizes)
        found = self.roi_heads.postprocess_detections(logits, regression, proposals, batch.image_sizes)
        detections: list[dict[str, Any]] = [
            {"boxes": boxes, "labels": labels, "scores": scores} for boxes, scores, labels in zip(*found, strict=True)
        ]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        masks = self._masks(features, detections, batch.image_sizes) if with_masks else None
        resized = cast(list[Detections], self.transform.postprocess(detections, batch.image_sizes, sizes))
        if masks is not None:
            for one, its in zip(resized, masks, strict=True):
                one["masks"] = its
        return resized

    def _masks(
        self, features: Mapping[str, Tensor], detections: list[dict[str, Any]], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Return the masks of each image's detections, of their classes, 0 to 1: (N, 28, 28)."""
        heads = self.roi_heads
        boxes, labels = ([one[name] for one in detections] for name in ("boxes", "labels"))
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, sizes)))
        return [masks[:, 0] for masks in maskrcnn_inference(logits, labels)]

    def select_classes(self, classes: Sequence[str]) -> None:
        """See `Detector.select_classes`. The masks' rows too."""
        rows = torch.tensor([0] + [self.classes.index(name) + 1 for name in classes])
        predictor = self.roi_heads.mask_predictor
        predictor.mask_fcn_logits = select_outputs(predictor.mask_fcn_logits, rows)
        super().select_classes(classes)


def _with_masks(labels: Tensor, matches: Tensor, target: Target) -> Tensor:
    """Return the rows of an image's positive proposals whose targets have masks."""
    rows = torch.where(labels > 0)[0]
    present = target["masks"].flatten(1).any(dim=1).bool()
    return rows[present[matches[rows]]]


FAMILY = Family(
    summary="Faster R-CNN with a mask head, trained where the data has masks (He et al. 2017), torchvision's.",
    config=MaskRCNNConfig,
    detector=MaskRCNNDetector,
    anchors=ANCHORS,
    published={
        "maskrcnn_resnet50_fpn": Published(
            config=MaskRCNNConfig(backbone="torchvision/resnet50", frozen_batch_norm=True, batch_norm_epsilon=0.0),
            weights={"COCO_V1": MaskRCNN_ResNet50_FPN_Weights.COCO_V1},
        ),
        "maskrcnn_resnet50_fpn_v2": Published(
            config=MaskRCNNConfig(
                backbone="torchvision/resnet50",
                pyramid_batch_norm=True,
                rpn_convolutions=2,
                box_head="convolutional",
                mask_batch_norm=True,
            ),
            weights={"COCO_V1": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1},
        ),
    },
)
