"""Faster R-CNN with a feature pyramid: torchvision's model, with its forward pass laid open for distillation."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from worker.detectors.base import Detections, Detector, HeadKind, Part, Target, TrainPass
from worker.detectors.config import AnchorRatios, MaxDetections, NmsThreshold, PyramidConfig, ScoreThreshold

ROI_SIZE = 7


class FasterRCNNConfig(PyramidConfig):
    """A Faster R-CNN. The defaults are torchvision's `fasterrcnn_resnet50_fpn`, the backbone apart."""

    architecture: Literal["faster_rcnn"] = "faster_rcnn"
    pool_level: Annotated[
        bool, Field(description="Add a level at twice the coarsest stride; only the proposals use it.")
    ] = True
    anchor_scale: Annotated[
        float, Field(description="Side of a level's anchors, as a multiple of its stride.", gt=0, le=64)
    ] = 8.0
    anchor_ratios: AnchorRatios = (0.5, 1.0, 2.0)
    pyramid_batch_norm: Annotated[bool, Field(description="Batch norm behind the pyramid's convolutions.")] = False
    rpn_convolutions: Annotated[
        int, Field(description="3x3 convolutions of the proposal network, before its outputs.", ge=1, le=4)
    ] = 1
    box_head: Annotated[
        Literal["linear", "convolutional"],
        Field(
            description="`linear`: two linear layers. `convolutional`: four 3x3 convolutions with batch norm, then one "
            "linear layer; slower and more accurate."
        ),
    ] = "linear"
    head_channels: Annotated[int, Field(description="Width of the box head's linear layers.", ge=16, le=4096)] = 1024
    train_proposals: Annotated[
        int, Field(description="Proposals kept per picture in training, after suppression.", ge=16, le=4000)
    ] = 2000
    test_proposals: Annotated[
        int, Field(description="Proposals kept per picture in detection, after suppression.", ge=16, le=4000)
    ] = 1000
    box_samples: Annotated[
        int, Field(description="Proposals per picture that the box head is trained on.", ge=8, le=2048)
    ] = 512
    score_threshold: ScoreThreshold = 0.05
    nms_threshold: NmsThreshold = 0.5
    max_detections: MaxDetections = 100


class FasterRCNNDetector(FasterRCNN, Detector):
    """torchvision's Faster R-CNN (same parameters, same names), rebuilt from a config. See `Detector`."""

    head_kind: HeadKind = "two_stage"
    provides: tuple[Part, ...] = ("backbone", "anchors", "logits")
    # What torchvision sets without saying the types.
    transform: Any
    backbone: Any
    rpn: Any
    roi_heads: Any

    def __init__(self, config: FasterRCNNConfig, classes: Sequence[str], *, pretrained_backbone: bool = False) -> None:
        """Build the detector with random weights, or with an ImageNet backbone."""
        pyramid = config.build_pyramid(
            "pool" if config.pool_level else "none",
            pretrained=pretrained_backbone,
            batch_norm=config.pyramid_batch_norm,
        )
        anchors = AnchorGenerator(
            sizes=tuple((round(config.anchor_scale * stride),) for stride in pyramid.strides),
            aspect_ratios=(config.anchor_ratios,) * len(pyramid.strides),
        )
        super().__init__(
            pyramid,
            min_size=config.min_size,
            max_size=config.max_size,
            rpn_anchor_generator=anchors,
            rpn_post_nms_top_n_train=config.train_proposals,
            rpn_post_nms_top_n_test=config.test_proposals,
            rpn_pre_nms_top_n_train=config.train_proposals,
            rpn_pre_nms_top_n_test=config.test_proposals,
            box_roi_pool=MultiScaleRoIAlign(
                [str(level) for level in range(len(config.strides))], output_size=ROI_SIZE, sampling_ratio=2
            ),
            box_head=_box_head(config),
            box_predictor=FastRCNNPredictor(config.head_channels, len(classes) + 1),
            rpn_head=RPNHead(
                config.pyramid_channels, anchors.num_anchors_per_location()[0], conv_depth=config.rpn_convolutions
            ),
            box_score_thresh=config.score_threshold,
            box_nms_thresh=config.nms_threshold,
            box_detections_per_img=config.max_detections,
            box_batch_size_per_image=config.box_samples,
        )
        self.introduce(config, classes, strides=pyramid.strides)

    def trunk(self, images: Tensor) -> Mapping[str, Tensor]:
        """See `Detector.trunk`."""
        return cast(Mapping[str, Tensor], self.backbone(images))

    def train_pass(self, images: list[Tensor], targets: list[Target]) -> TrainPass:
        """See `Detector.train_pass`.

        torchvision's forward, step by step, so that features, sampled proposals and their logits can be seen. Random
        numbers are drawn in its order: the losses are its losses (held by a test).
        """
        batch, scaled = self.transform(images, targets)
        maps = self.maps(batch.tensors)
        features = maps.features
        proposals, rpn_losses, objectness, anchors = self._propose(batch, features, scaled)
        proposals, _, labels, regression_targets = self.roi_heads.select_training_samples(proposals, scaled)
        class_logits, box_regression = self._head(features, proposals, batch.image_sizes)
        class_loss, box_loss = fastrcnn_loss(class_logits, box_regression, labels, regression_targets)
        return TrainPass(
            images=batch.tensors,
            image_sizes=batch.image_sizes,
            targets=scaled,
            features=features,
            losses={"loss_classifier": class_loss, "loss_box_reg": box_loss, **rpn_losses},
            proposals=proposals,
            labels=labels,
            class_logits=class_logits,
            score=lambda others: self.score(features, others, batch.image_sizes),
            backbone=maps.backbone,
            anchors=anchors,
            cell_logits=[level.unsqueeze(2) for level in objectness],
        )

    def _propose(
        self, batch: ImageList, features: Mapping[str, Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor], list[Tensor]]:
        """torchvision's `RegionProposalNetwork.forward` in training, so that its scores and anchors can be seen.

        Returns:
            The proposals of each picture, (P_i, 4); the network's losses; and of each level the objectness logits,
            (B, A, H, W), and the anchors, (H W A, 4).
        """
        rpn = self.rpn
        levels = list(features.values())
        objectness, deltas = rpn.head(levels)
        anchors = rpn.anchor_generator(batch, levels)
        counts = [level[0].numel() for level in objectness]
        flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
        # Proposals are given to the box head as constants.
        boxes = rpn.box_coder.decode(flat_deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = rpn.filter_proposals(boxes, flat_objectness, batch.image_sizes, counts)
        labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
        objectness_loss, box_loss = rpn.compute_loss(
            flat_objectness, flat_deltas, labels, rpn.box_coder.encode(matched, anchors)
        )
        losses = {"loss_objectness": objectness_loss, "loss_rpn_box_reg": box_loss}
        return proposals, losses, objectness, list(anchors[0].split(counts))

    def cell_logits(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """See `Detector.cell_logits`: the proposal network's objectness."""
        return [level.unsqueeze(2) for level in self.rpn.head(list(features.values()))[0]]

    @property
    def scores_per_cell(self) -> tuple[int, int]:
        """See `Detector.scores_per_cell`."""
        return self.rpn.head.cls_logits.out_channels, 1

    def score(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """See `Detector.score`."""
        return self._head(features, proposals, image_sizes)[0]

    def sample(
        self,
        features: Mapping[str, Tensor],
        images: Tensor,
        image_sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `Detector.sample`. As many are proposed as in training or in detection, by the detector's mode."""
        proposals, _ = self.rpn(ImageList(images, image_sizes), features, targets)
        proposals, _, labels, _ = self.roi_heads.select_training_samples(proposals, targets)
        return proposals, labels

    def _head(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        heads = self.roi_heads
        pooled = heads.box_roi_pool(features, proposals, image_sizes)
        return cast(tuple[Tensor, Tensor], heads.box_predictor(heads.box_head(pooled)))

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """See `Detector.detect`."""
        return cast(list[Detections], self(images))

    def select_classes(self, classes: Sequence[str]) -> None:
        """See `Detector.select_classes`. Rows of the predictor are kept; softmax then runs over what is left."""
        rows = torch.tensor([0] + [self.classes.index(name) + 1 for name in classes])
        predictor = self.roi_heads.box_predictor
        box_rows = (rows[:, None] * 4 + torch.arange(4)).flatten()
        predictor.cls_score = _select_rows(predictor.cls_score, rows)
        predictor.bbox_pred = _select_rows(predictor.bbox_pred, box_rows)
        self.classes = list(classes)


def _box_head(config: FasterRCNNConfig) -> nn.Module:
    """Return the layers between pooled features (P, C, 7, 7) and predictor: (P, head_channels)."""
    if config.box_head == "linear":
        return cast(nn.Module, TwoMLPHead(config.pyramid_channels * ROI_SIZE**2, config.head_channels))
    channels = config.pyramid_channels
    head = FastRCNNConvFCHead(
        (channels, ROI_SIZE, ROI_SIZE), [channels] * 4, [config.head_channels], norm_layer=nn.BatchNorm2d
    )
    return cast(nn.Module, head)


def _select_rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """Return a linear layer with only these of the outputs, in this order."""
    rows = rows.to(layer.weight.device)
    selected = nn.Linear(layer.in_features, len(rows), device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        selected.weight.copy_(layer.weight[rows])
        selected.bias.copy_(layer.bias[rows])
    return selected
