"""What the engine and the methods need of a detector, whatever its family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Self, TypedDict, cast

from torch import Tensor, nn

from defeat.engine.config import Config
from defeat.engine.detectors.backbones import Pyramid
from defeat.engine.detectors.compilation import Compiled
from defeat.engine.detectors.normalization import Normalization
from defeat.engine.detectors.unblocked import unblock
from defeat.engine.report import RunError

HeadKind = Literal["two_stage", "one_stage"]
Part = Literal["backbone", "anchors", "logits"]


class Target(TypedDict):
    """Ground truth of one image: boxes (N, 4) float, x1 y1 x2 y2 in its pixels; labels (N,) int64, from 1.

    For detectors that train on masks, where the data has some, also masks (N, H, W) uint8, 1 on the object. One that is
    all 0 is none: its box has no mask, or nothing of it is left in the image.
    """

    boxes: Tensor
    labels: Tensor
    masks: NotRequired[Tensor]


class Detections(TypedDict):
    """Detections in one image: boxes (N, 4) in its pixels, labels (N,) from 1, scores (N,) 0 to 1, descending.

    Those of `detect_with_masks` also have masks, (N, M, M): how likely each point of a grid over its box is the object.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: NotRequired[Tensor]


@dataclass(frozen=True, kw_only=True)
class Maps:
    """What one forward pass of a trunk makes of a batch.

    Attributes:
        features: the pyramid's maps by level name, finest first.
        backbone: the backbone's maps by stride in pixels, finest first, as the pyramid takes them in; None for families
            whose trunk is no `Pyramid`.
    """

    features: Mapping[str, Tensor]
    backbone: Mapping[int, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class TrainPass:
    """One training forward pass of a detector, with everything a distillation method may match.

    Attributes:
        images: (B, 3, H, W), normalised, resized and padded: what the trunk saw, and, normalised as it is used to, what
            a teacher's trunk is fed.
        normalization: how they were normalised.
        image_sizes: height and width of each image in `images`, without the padding.
        targets: ground truth in the pixels of `images`.
        features: the pyramid's maps by level name, finest first.
        losses: the detector's own losses, exactly torchvision's.
        proposals: the sampled proposals of each image, (P_i, 4); None for one-stage detectors.
        labels: the class of each sampled proposal, (P_i,), 0 for background; None likewise.
        class_logits: (sum of P_i, classes + 1), column 0 is background; None likewise.
        score_proposals: the same head on the same features, for other proposals: their class logits, with gradients;
            None likewise.
        backbone: the backbone's maps by stride, see `Maps`; None where the detector does not provide "backbone".
        anchors: the anchors of each pyramid level, (H W A, 4) in the pixels of `images`, cell by cell in rows, the same
            for every image; None where the detector does not provide "anchors".
        cell_logits: what the dense head scores in each cell, see `Detector.cell_logits`; None where the detector does
            not provide "logits".
    """

    images: Tensor
    normalization: Normalization
    image_sizes: list[tuple[int, int]]
    targets: list[Target]
    features: Mapping[str, Tensor]
    losses: dict[str, Tensor]
    proposals: list[Tensor] | None = None
    labels: list[Tensor] | None = None
    class_logits: Tensor | None = None
    score_proposals: Callable[[list[Tensor]], Tensor] | None = None
    backbone: Mapping[int, Tensor] | None = None
    anchors: list[Tensor] | None = None
    cell_logits: list[Tensor] | None = None


def full_coverage(tensors: int) -> dict[str, Any]:
    """Return the coverage of a weights file that holds each of a detector's tensors."""
    return {"loaded": tensors, "total": tensors, "missing": [], "unexpected": []}


class Detector(nn.Module):
    """A detector: called as torchvision's are (`model(images, targets)`), and able to be taken apart.

    A family derives from its torchvision class and from this one. The methods here say what each must do.

    Attributes:
        config: the spec that rebuilds it.
        classes: the names of the labels 1, 2, ….
        head_kind: two-stage heads score proposals, one-stage heads every cell of the pyramid.
        strides: the stride of each pyramid level in pixels, finest first, as `features` returns them.
        channels: the channels of each pyramid level, likewise.
        transform: torchvision's: it resizes, normalises and pads.
        trains_masks: whether targets' masks are of any use to it.
        provides: what a method may match besides the pyramid: "backbone" (the backbone's maps), "anchors" and "logits"
            (class logits of each cell, scored by a sigmoid).
        leaves_parameters_out: whether a training pass may leave trainable parameters out of its graph, depending on the
            images: they then get no gradient, not even a zero.
    """

    provides: tuple[Part, ...] = ()
    trains_masks: bool = False
    leaves_parameters_out: bool = False
    _statistics_frozen: bool = False
    _compiled: tuple[Compiled, ...] = ()  # what `maps` calls in place of the backbone, or of its body and its pyramid

    backbone: Any  # torchvision's attribute, whose type differs by family
    config: Config
    classes: list[str]
    head_kind: HeadKind
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    transform: Any

    def introduce(
        self, config: Config, classes: Sequence[str], *, strides: Sequence[int], channels: Sequence[int]
    ) -> None:
        """Set the attributes above; a family calls it once its modules stand.

        Its transform and its box coders are replaced by their equals of `unblocked`.
        """
        self.config = config
        self.classes = list(classes)
        self.strides = tuple(strides)
        self.channels = tuple(channels)
        unblock(self)

    @property
    def normalization(self) -> Normalization:
        """How `features` expects its images to be normalised."""
        return Normalization(mean=tuple(self.transform.image_mean), std=tuple(self.transform.image_std))

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that each image is resized to, or None where they keep their shape."""
        if self.transform.fixed_size is None:
            return None
        width, height = self.transform.fixed_size
        return height, width

    def freeze_stages(self, stages: int) -> None:
        """Fix the first `stages` (0 to 4) of the backbone, see `Pyramid.freeze`; before an optimiser is built.

        Raises:
            RunError: `stages_cannot_freeze` if the detector has no backbone with a pyramid, unless `stages` is 0.
            ValueError: `stages` is out of range.
        """
        self.require_stages(stages)
        if stages:
            self.backbone.freeze(stages)
            self.train(self.training)  # the backbone knows of its frozen stages alone

    def freeze_statistics(self) -> None:
        """Fix the running statistics of the backbone's batch norm, whose weight and bias are trained on.

        It then normalises in training as it does in eval mode (`norm_eval` in mmdetection and the DeFeat authors'
        code). Batch norm of the pyramid and the head stays as it is, and so does a backbone that has none, or only
        frozen. What is fixed remains so.
        """
        self._statistics_frozen = True
        self.train(self.training)

    @property
    def body(self) -> nn.Module:
        """The backbone without the levels that the detector adds to it."""
        return cast(nn.Module, self.backbone.body)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except in what is frozen."""
        super().train(mode)
        if self._statistics_frozen:
            for module in self.body.modules():  # found anew: synchronised batch norm replaces them
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def require_stages(self, stages: int) -> None:
        """Raise what `freeze_stages` would raise for a detector without a pyramid; freeze nothing."""
        if stages and not isinstance(getattr(self, "backbone", None), Pyramid):
            raise RunError(
                "user",
                "stages_cannot_freeze",
                f"{stages} stages of the backbone are to be frozen, and a {type(self).__name__} has no stages that "
                "could be: leave it at 0, or take a detector on a backbone with a feature pyramid",
            )

    def synchronise_batch_norm(self) -> None:
        """Let batch norm take its statistics over all processes that train together, on GPUs; before they begin.

        Each of them must then go through every such layer in every step.
        """
        nn.SyncBatchNorm.convert_sync_batchnorm(self)

    @property
    def least_images(self) -> int:
        """How many images a training pass needs at least; a normalisation may have none to take the variance of."""
        return 1

    def compile_trunk(self) -> None:
        """Let `maps`, which a training step calls, run compiled by torch.compile, from the next call on.

        Nothing else does: `features`, `detect` and a plain call stay as they are, and so do the names of parameters.
        The backbone's weights are put into channels_last order, see `Compiled`. If compilation fails, `maps` goes on
        without it, and `compilation_failure` says why.
        """
        pyramid = self.backbone
        # Two graphs: gradients from the pyramid's maps back to the backbone's are asked for, too, and lead through the
        # second alone.
        modules = (pyramid.body, pyramid.fpn) if isinstance(pyramid, Pyramid) else (pyramid,)
        self._compiled = tuple(Compiled(module, dynamic=self.fixed_size is None) for module in modules)

    @property
    def compilation_failure(self) -> str | None:
        """Why `maps` no longer runs compiled, in one line; None if it does, or was never to."""
        return next((one.failure for one in self._compiled if one.failure is not None), None)

    def features(self, images: Tensor) -> Mapping[str, Tensor]:
        """(B, 3, H, W), normalised and padded -> the pyramid's maps."""
        raise NotImplementedError

    def maps(self, images: Tensor) -> Maps:
        """Return what `features` does and the backbone's maps besides, of one and the same pass."""
        pyramid = self.backbone
        if not isinstance(pyramid, Pyramid):
            (whole,) = self._compiled or (pyramid,)
            return Maps(features=whole(images), backbone=None)
        body, fpn = self._compiled or (pyramid.body, pyramid.fpn)
        stages = body(images)
        # The strides of the backbone's maps come first; those of the extra levels have no map there.
        return Maps(features=fpn(stages), backbone=dict(zip(pyramid.strides, stages.values(), strict=False)))

    @property
    def backbone_channels(self) -> dict[int, int]:
        """The channels of the backbone's maps by stride; empty for a detector that does not provide "backbone"."""
        pyramid = self.backbone
        if not isinstance(pyramid, Pyramid):
            return {}
        inner = [block[0].in_channels for block in pyramid.fpn.inner_blocks]
        return dict(zip(pyramid.strides, inner, strict=False))

    def cell_logits(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Class logits of each cell by this detector's dense head: (B, A, K, H, W) of each level, to go into a sigmoid.

        A counts the anchors of a cell and K what the head tells apart: the classes of a one-stage head, in their order,
        or 1, object or not, of a proposal network. Only of detectors that provide "logits": of others this raises
        `NotImplementedError`.
        """
        raise NotImplementedError

    @property
    def scores_per_cell(self) -> tuple[int, int]:
        """A and K of `cell_logits`; likewise."""
        raise NotImplementedError

    def forward_train(self, images: list[Tensor], targets: list[Target]) -> TrainPass:
        """Run forward in training mode on images (3, H, W), float, 0 to 1; the losses are those of a plain call."""
        raise NotImplementedError

    def score_proposals(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Class logits (sum of P_i, classes + 1) of proposals, by this detector's head on its own features.

        Two-stage detectors only: a one-stage head knows no proposals, and this raises `NotImplementedError`.
        """
        raise NotImplementedError

    def sample_proposals(
        self,
        features: Mapping[str, Tensor],
        images: Tensor,
        image_sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Propose boxes from this detector's own features and sample them as for training, ground truth added.

        Draws from the global generator.

        Args:
            features: what `features` made of `images`.
            images: (B, 3, H, W), normalised and padded.
            image_sizes: height and width of each image in `images`, without the padding.
            targets: ground truth in the pixels of `images`.

        Returns:
            The sampled proposals of each image, (P_i, 4), and their classes, (P_i,), 0 for background.
        """
        raise NotImplementedError

    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Detect in images (3, H, W), float, 0 to 1; in eval mode, without gradients."""
        raise NotImplementedError

    def detect_with_masks(self, images: list[Tensor]) -> list[Detections]:
        """Detect objects and their masks, in inference mode. Only detectors that have `trains_masks` can."""
        raise NotImplementedError

    def select_classes(self, classes: Sequence[str]) -> None:
        """Keep only these of the detector's classes, in this order; all must be known to it, and come once.

        Twice the same class would split its share of a softmax, and be detected twice under a sigmoid.
        """
        raise NotImplementedError
