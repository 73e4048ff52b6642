"""Faster R-CNN on a feature pyramid: torchvision's model, with its forward pass open to distillation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN,
    FasterRCNN_ResNet50_FPN_V2_Weights,
    FasterRCNN_ResNet50_FPN_Weights,
)
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from defeat.engine.detectors.base import Detections, Detector, HeadKind, Part, Target, TrainPass
from defeat.engine.detectors.config import (
    AnchorRatios,
    MaxDetections,
    NmsThreshold,
    PyramidConfig,
    ScoreThreshold,
    adds_levels,
    decides,
)
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.outputs import select_outputs
from defeat.engine.detectors.precision import WideAnchors, WideRPNHead, widened
from defeat.engine.detectors.pyramid import PyramidDetector
from defeat.rules.anchors import AnchorSizes

ROI_SIZE = 7
ANCHORS = AnchorSizes()

ProposalThreshold = Annotated[float, Field(description="Minimum objectness score of a proposal.", ge=0, lt=1)]


class TwoStageConfig(PyramidConfig):
    """What the families that derive from Faster R-CNN have in common."""

    pool_level: Annotated[
        bool,
        Field(
            description="Add a level at twice the coarsest stride; only the proposal network uses it.",
            json_schema_extra=adds_levels({True: "pool"}),
        ),
    ] = True
    anchor_scale: Annotated[
        float,
        Field(
            description="Side of a level's anchors, as a multiple of its stride.",
            gt=0,
            le=64,
            json_schema_extra=decides("anchors"),
        ),
    ] = 8.0
    anchor_ratios: AnchorRatios = (0.5, 1.0, 2.0)
    pyramid_batch_norm: Annotated[
        bool, Field(description="Batch norm after the pyramid's convolutions.", json_schema_extra=decides("tensors"))
    ] = False
    rpn_convolutions: Annotated[
        int,
        Field(
            description="Number of 3x3 convolutions in the proposal network, before its outputs.",
            ge=1,
            le=4,
            json_schema_extra=decides("tensors"),
        ),
    ] = 1
    box_head: Annotated[
        Literal["linear", "convolutional"],
        Field(
            description="`linear`: two linear layers. `convolutional`: four 3x3 convolutions with batch norm, then one "
            "linear layer; slower and more accurate.",
            json_schema_extra=decides("tensors"),
        ),
    ] = "linear"
    head_channels: Annotated[
        int,
        Field(
            description="Width of the box head's linear layers.",
            ge=16,
            le=4096,
            json_schema_extra=decides("tensors"),
        ),
    ] = 1024
    train_proposals: Annotated[
        int,
        Field(
            description="Maximum number of proposals per image in training, after non-maximum suppression.",
            ge=16,
            le=4000,
        ),
    ] = 2000
    test_proposals: Annotated[
        int,
        Field(
            description="Maximum number of proposals per image in detection, after non-maximum suppression.",
            ge=16,
            le=4000,
        ),
    ] = 1000
    box_samples: Annotated[
        int, Field(description="Number of proposals per image that the box head is trained on.", ge=8, le=2048)
    ] = 512
    proposal_threshold: ProposalThreshold = 0.0
    score_threshold: ScoreThreshold = 0.05
    nms_threshold: NmsThreshold = 0.5
    max_detections: MaxDetections = 100

    def make_pyramid(self, *, pretrained: bool) -> Any:
        """Build backbone and FPN, with random weights or ImageNet's: a `Pyramid`, or a module like it."""
        return self.build_pyramid(
            "pool" if self.pool_level else "none", pretrained=pretrained, batch_norm=self.pyramid_batch_norm
        )

    def anchor_sizes(self, strides: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the sides of the anchors of each level in pixels."""
        return tuple(ANCHORS.of(dict(self), stride) for stride in strides)


class TwoStageDetector(FasterRCNN, Detector):
    """torchvision's Faster R-CNN (same parameters, same names), rebuilt from a config. See `Detector`.

    A family derives from it, and before it from `PyramidDetector` if its backbone is a `Pyramid`.
    """

    head_kind: HeadKind = "two_stage"
    provides: tuple[Part, ...] = ("anchors", "logits")
    # What torchvision sets without saying the types.
    backbone: Any
    rpn: Any
    roi_heads: Any

    def __init__(self, config: TwoStageConfig, classes: Sequence[str], *, pretrained_backbone: bool = False) -> None:
        """Build the detector with random weights, or with an ImageNet backbone."""
        pyramid = config.make_pyramid(pretrained=pretrained_backbone)
        anchors = WideAnchors(
            sizes=config.anchor_sizes(pyramid.strides),
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
            rpn_score_thresh=config.proposal_threshold,
            box_roi_pool=MultiScaleRoIAlign(
                [str(level) for level in range(len(config.strides))], output_size=ROI_SIZE, sampling_ratio=2
            ),
            box_head=_box_head(config),
            box_predictor=FastRCNNPredictor(config.head_channels, len(classes) + 1),
            rpn_head=WideRPNHead(
                config.pyramid_channels, anchors.num_anchors_per_location()[0], conv_depth=config.rpn_convolutions
            ),
            box_score_thresh=config.score_threshold,
            box_nms_thresh=config.nms_threshold,
            box_detections_per_img=config.max_detections,
            box_batch_size_per_image=config.box_samples,
        )
        self.introduce(config, classes, strides=pyramid.strides, channels=pyramid.channels)

    def features(self, images: Tensor) -> Mapping[str, Tensor]:
        """See `Detector.features`."""
        return cast(Mapping[str, Tensor], self.backbone(images))

    def forward_train(self, images: list[Tensor], targets: list[Target]) -> TrainPass:
        """See `Detector.forward_train`.

        torchvision's forward, step by step, so that features, sampled proposals and their logits can be seen. Random
        numbers are drawn in its order: the losses are its losses (held by a test).
        """
        batch, scaled = self.transform(images, targets)
        maps = self.maps(batch.tensors)
        features = maps.features
        proposals, rpn_losses, objectness, anchors = self._propose(batch, features, scaled)
        proposals, matches, labels, regression_targets = self.select(proposals, scaled)
        class_logits, box_regression = self._head(features, proposals, batch.image_sizes)
        class_loss, box_loss = fastrcnn_loss(class_logits, box_regression, labels, regression_targets)
        return TrainPass(
            images=batch.tensors,
            normalization=self.normalization,
            image_sizes=batch.image_sizes,
            targets=scaled,
            features=features,
            losses={
                "loss_classifier": class_loss,
                "loss_box_reg": box_loss,
                **self.further_losses(features, proposals, matches, labels, batch.image_sizes, scaled),
                **rpn_losses,
            },
            proposals=proposals,
            labels=labels,
            class_logits=class_logits,
            score_proposals=lambda others: self.score_proposals(features, others, batch.image_sizes),
            backbone=maps.backbone,
            anchors=anchors,
            cell_logits=[level.unsqueeze(2) for level in objectness],
        )

    def select(
        self, proposals: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Add the ground truth to each image's proposals and sample them for training, by torchvision's sampler.

        Returns:
            For each image the sampled proposals (P_i, 4), the index of each one's target (P_i,), its class (P_i,), 0
            for background, and its regression target (P_i, 4).
        """
        sampled = self.roi_heads.select_training_samples(proposals, targets)
        return cast(tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]], sampled)

    def further_losses(
        self,
        features: Mapping[str, Tensor],  # noqa: ARG002 - for the families that have some
        proposals: list[Tensor],  # noqa: ARG002
        matches: list[Tensor],  # noqa: ARG002
        labels: list[Tensor],  # noqa: ARG002
        image_sizes: list[tuple[int, int]],  # noqa: ARG002
        targets: list[Target],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the losses of what further heads a family has, none here.

        Args:
            features: the pyramid's maps.
            proposals: the sampled proposals of each image, (P_i, 4).
            matches: the index of the target that each is nearest to, (P_i,).
            labels: the class of each, (P_i,), 0 for background.
            image_sizes: height and width of each image, without the padding.
            targets: ground truth in the pixels of the batch.
        """
        return {}

    def _propose(
        self, batch: ImageList, features: Mapping[str, Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor], list[Tensor]]:
        """torchvision's `RegionProposalNetwork.forward` in training, so that its scores and anchors can be seen.

        Returns:
            The proposals of each image, (P_i, 4); the network's losses; and of each level the objectness logits,
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

    def score_proposals(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """See `Detector.score_proposals`. In training mode too, the head's batch norm keeps its running statistics."""
        with _statistics_kept(self.roi_heads.box_head):
            scored = self._scored_features(features, proposals, image_sizes)
        return widened(self.roi_heads.box_predictor.cls_score(scored))

    def sample_proposals(
        self,
        features: Mapping[str, Tensor],
        images: Tensor,
        image_sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `Detector.sample_proposals`. The detector's mode decides how many are proposed."""
        proposals, _ = self.rpn(ImageList(images, image_sizes), features, targets)
        proposals, _, labels, _ = self.select(proposals, targets)
        return proposals, labels

    def _head(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        predictor = self.roi_heads.box_predictor
        class_logits, box_regression = predictor(self._scored_features(features, proposals, image_sizes))
        return widened(class_logits), widened(box_regression)

    def _scored_features(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        pooled = self.roi_heads.box_roi_pool(features, proposals, image_sizes)
        return cast(Tensor, self.roi_heads.box_head(pooled))

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """See `Detector.detect`."""
        return cast(list[Detections], self(images))

    def select_classes(self, classes: Sequence[str]) -> None:
        """See `Detector.select_classes`. Rows of the predictor are kept; softmax then runs over what is left."""
        rows = torch.tensor([0] + [self.classes.index(name) + 1 for name in classes])
        predictor = self.roi_heads.box_predictor
        box_rows = (rows[:, None] * 4 + torch.arange(4)).flatten()
        predictor.cls_score = select_outputs(predictor.cls_score, rows)
        predictor.bbox_pred = select_outputs(predictor.bbox_pred, box_rows)
        self.classes = list(classes)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are: batch norm in training mode still normalises by its batch's own."""
    norms = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _box_head(config: TwoStageConfig) -> nn.Module:
    """Return the layers between pooled features (P, C, 7, 7) and predictor: (P, head_channels)."""
    if config.box_head == "linear":
        return cast(nn.Module, TwoMLPHead(config.pyramid_channels * ROI_SIZE**2, config.head_channels))
    channels = config.pyramid_channels
    head = FastRCNNConvFCHead(
        (channels, ROI_SIZE, ROI_SIZE), [channels] * 4, [config.head_channels], norm_layer=nn.BatchNorm2d
    )
    return cast(nn.Module, head)


class FasterRCNNConfig(TwoStageConfig):
    """A Faster R-CNN. The defaults are torchvision's `fasterrcnn_resnet50_fpn`, except the backbone."""

    architecture: Literal["faster_rcnn"] = "faster_rcnn"


class FasterRCNNDetector(PyramidDetector, TwoStageDetector):
    """Faster R-CNN on a backbone with a feature pyramid."""

    provides: tuple[Part, ...] = ("backbone", "anchors", "logits")


FAMILY = Family(
    summary="Two-stage detector on a feature pyramid (Ren et al. 2015, Lin et al. 2017), torchvision's.",
    config=FasterRCNNConfig,
    detector=FasterRCNNDetector,
    anchors=ANCHORS,
    published={
        "fasterrcnn_resnet50_fpn": Published(
            config=FasterRCNNConfig(backbone="torchvision/resnet50", frozen_batch_norm=True, batch_norm_epsilon=0.0),
            weights={"COCO_V1": FasterRCNN_ResNet50_FPN_Weights.COCO_V1},
        ),
        "fasterrcnn_resnet50_fpn_v2": Published(
            config=FasterRCNNConfig(
                backbone="torchvision/resnet50", pyramid_batch_norm=True, rpn_convolutions=2, box_head="convolutional"
            ),
            weights={"COCO_V1": FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1},
        ),
    },
)
