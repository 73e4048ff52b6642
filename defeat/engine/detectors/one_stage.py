"""What one-stage families share: dense heads over the pyramid, with a forward pass open to distillation.

Labels. torchvision's RetinaNet and FCOS give each class a column of its own and score it by a sigmoid; a label is the
index of its column, and there is no background class. Its published weights were trained on labels from 1 all the same:
they have 91 columns for 90 classes, and column 0 is never a target. So do detectors here: labels count from 1
everywhere, the head has one column more than there are classes, and column 0 is no class: it is never a target and
never detected. A detector that someone trained so with torchvision can be uploaded as it is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from defeat.engine.detectors.base import Detections, Detector, HeadKind, Target, TrainPass
from defeat.engine.detectors.config import PyramidConfig, Strides, adds_levels
from defeat.engine.detectors.outputs import select_outputs
from defeat.engine.detectors.precision import widened
from defeat.engine.detectors.pyramid import PyramidDetector


class OneStageConfig(PyramidConfig):
    """What one-stage detectors on a feature pyramid have in common."""

    strides: Strides = (8, 16, 32)
    extra_levels: Annotated[
        Literal["none", "p6p7", "p6p7_backbone"],
        Field(
            description="`p6p7`: two more levels, at 2 and 4 times the coarsest stride, by convolutions from the "
            "pyramid's coarsest map. `p6p7_backbone`: the same from the backbone's coarsest map.",
            json_schema_extra=adds_levels({"p6p7": "p6p7", "p6p7_backbone": "p6p7_backbone"}),
        ),
    ] = "p6p7"
    candidates: Annotated[
        int,
        Field(
            description="Maximum number of boxes per level and image in detection, before non-maximum suppression.",
            ge=1,
            le=10_000,
        ),
    ] = 1000


class OneStageDetector(Detector):
    """The methods of a one-stage detector. A family derives from this and, after it, from its torchvision class."""

    head_kind: HeadKind = "one_stage"
    # What torchvision sets without saying the types.
    backbone: Any
    head: Any
    anchor_generator: Any
    compute_loss: Any

    def features(self, images: Tensor) -> Mapping[str, Tensor]:
        """See `Detector.features`."""
        return cast(Mapping[str, Tensor], self.backbone(images))

    def forward_train(self, images: list[Tensor], targets: list[Target]) -> TrainPass:
        """See `Detector.forward_train`.

        torchvision's forward, step by step, so that features can be seen: the losses are its losses (held by a test).
        """
        batch, scaled = self.transform(images, targets)
        maps = self.maps(batch.tensors)
        levels = list(maps.features.values())
        outputs = {name: widened(output) for name, output in self.head(levels).items()}
        anchors = self.anchor_generator(batch, levels)
        losses = self.match_and_compare(scaled, outputs, anchors, levels)
        return TrainPass(
            images=batch.tensors,
            normalization=self.normalization,
            image_sizes=batch.image_sizes,
            targets=scaled,
            features=maps.features,
            losses=losses,
            backbone=maps.backbone,
            anchors=_by_level(anchors[0], levels) if "anchors" in self.provides else None,
            cell_logits=_by_cell(outputs["cls_logits"], levels) if "logits" in self.provides else None,
        )

    def match_and_compare(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], levels: list[Tensor]
    ) -> dict[str, Tensor]:
        """Match each image's anchors (A, 4) with its targets; return the losses of the head's outputs (B, A, …)."""
        raise NotImplementedError

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """See `Detector.detect`."""
        return cast(list[Detections], self(images))


class SigmoidDetector(PyramidDetector, OneStageDetector):
    """A one-stage detector on a `Pyramid` that scores each class by a sigmoid: column 0 of its head is no class."""

    def cell_logits(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """See `Detector.cell_logits`: the classes; column 0, which is none, is left out."""
        levels = list(features.values())
        return _by_cell(self.head.classification_head(levels), levels)

    @property
    def scores_per_cell(self) -> tuple[int, int]:
        """See `Detector.scores_per_cell`."""
        head = self.head.classification_head
        return head.num_anchors, head.num_classes - 1

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[Detections]:
        """Turn the outputs of each level into detections as torchvision does, column 0 left out."""
        zero = torch.zeros(1, dtype=torch.long, device=head_outputs["cls_logits"][0].device)
        logits = [level.index_fill(-1, zero, -math.inf) for level in head_outputs["cls_logits"]]  # a score of 0
        torchvisions = cast(Any, super())
        found = torchvisions.postprocess_detections({**head_outputs, "cls_logits": logits}, anchors, image_shapes)
        return cast(list[Detections], found)

    def select_classes(self, classes: Sequence[str]) -> None:
        """See `Detector.select_classes`. Scores do not change: a sigmoid knows no other classes."""
        head = self.head.classification_head
        columns = torch.tensor([0] + [self.classes.index(name) + 1 for name in classes])
        # The outputs of a cell: every class of its first anchor, then of its second, …
        rows = (torch.arange(head.num_anchors)[:, None] * head.num_classes + columns).flatten()
        head.cls_logits = select_outputs(head.cls_logits, rows)
        head.num_classes = len(columns)
        self.classes = list(classes)


def _by_level(anchors: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """Split values of all levels, cell by cell, (sum of H W A, …), into one tensor a level; A is the same on each."""
    cells = [level.shape[-2] * level.shape[-1] for level in levels]
    per_cell = anchors.shape[0] // sum(cells)
    return list(anchors.split([per_cell * count for count in cells]))


def _by_cell(logits: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """Views of a head's logits (B, sum of H W A, K + 1): (B, A, K, H, W) of each level, column 0 left out."""
    flat = _by_level(logits.transpose(0, 1), levels)  # (H W A, B, K + 1) of each level
    shaped = [one.unflatten(0, (*level.shape[-2:], -1)) for one, level in zip(flat, levels, strict=True)]
    return [one[..., 1:].permute(3, 2, 4, 0, 1) for one in shaped]
