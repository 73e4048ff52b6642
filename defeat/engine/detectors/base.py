"""The interface of a detector: what training, evaluation and methods call, whatever its family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Self, TypedDict, cast

from torch import Tensor, nn

from defeat.engine.config import Config, require
from defeat.engine.detectors.compilation import Compiled
from defeat.engine.detectors.normalization import Normalization
from defeat.engine.detectors.unblocked import unblock
from defeat.rules.training import Trainee, cannot_freeze, least_images

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
    """Feature maps of a batch, of one forward pass of backbone and neck.

    Attributes:
        features: the pyramid's maps by level name, finest first.
        backbone: the backbone's maps by stride in pixels, finest first, as the pyramid takes them in; None for families
            that do not provide "backbone".
    """

    features: Mapping[str, Tensor]
    backbone: Mapping[int, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class TrainPass:
    """One training forward pass of a detector, with everything a distillation method may match.

    Attributes:
        images: (B, 3, H, W), normalised, resized and padded: the backbone's input, and after a change of normalisation
            the input of a teacher's.
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
    """A detector: called as torchvision's are (`model(images, targets)`), with its forward pass open to distillation.

    A family derives from its torchvision class and from this one, or from `PyramidDetector`. The methods here define
    what each must do. Class attributes state what detectors of a family can do.

    Attributes:
        config: the spec that rebuilds it.
        classes: the names of the labels 1, 2, ….
        head_kind: two-stage heads score proposals, one-stage heads every cell of the pyramid.
        strides: the stride of each pyramid level in pixels, finest first, as `features` returns them.
        channels: the channels of each pyramid level, likewise.
        transform: torchvision's: it resizes, normalises and pads.
        trains_masks: whether it has a mask head, which targets' masks train.
        provides: what a method may compare in addition to the pyramid: "backbone" (its maps), "anchors" and "logits"
            (class logits of each cell, scored by a sigmoid).
        leaves_parameters_out: whether a training pass may leave trainable parameters out of its graph, depending on the
            images: they then get no gradient, not even a zero.
        normalizes_coarsest_map: whether batch norm sees its coarsest map, which may be a single cell.
    """

    provides: tuple[Part, ...] = ()
    trains_masks: bool = False
    leaves_parameters_out: bool = False
    normalizes_coarsest_map: bool = False
    _statistics_frozen: bool = False
    _compiled: tuple[Compiled, ...] = ()  # what `maps` calls in place of the modules of `_compilable`

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
        """Set the attributes above; a family calls it when all of its modules are built.

        Its transform and its box coders are replaced by their equals of `unblocked`.
        """
        self.config = config
        self.classes = list(classes)
        self.strides = tuple(strides)
        self.channels = tuple(channels)
        unblock(self)

    @property
    def family(self) -> str:
        """The name of its family."""
        return str(cast(Any, self.config).architecture)

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation that `features` expects its images to be normalised with."""
        return Normalization(mean=tuple(self.transform.image_mean), std=tuple(self.transform.image_std))

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that each image is resized to, or None where they keep their shape."""
        if self.transform.fixed_size is None:
            return None
        width, height = self.transform.fixed_size
        return height, width

    def trainee(self, who: str) -> Trainee:
        """Return the facts that the rules for its training need; `who`: "student" or "teacher"."""
        return Trainee(
            who=who,
            family=self.family,
            size=self.fixed_size and max(self.fixed_size),
            least_images=self.least_images,
            freezable="backbone" in self.provides,
        )

    def freeze_stages(self, stages: int) -> None:
        """Freeze the first `stages` (0 to 4) of the backbone; call it before an optimiser is built.

        Raises:
            RunError: `stages_cannot_freeze` if the family has no stages that could be frozen, unless `stages` is 0.
            ValueError: `stages` is out of range.
        """
        self.require_stages(stages)

    def freeze_statistics(self) -> None:
        """Freeze the running statistics of the backbone's batch norm; its weight and bias are trained on.

        It then normalises in training as it does in eval mode (`norm_eval` in mmdetection and the DeFeat authors'
        code). Batch norm of the pyramid and the head does not change, nor does a backbone that has none, or only frozen
        batch norm. There is no way back.
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
            for module in self.body.modules():  # found each time: synchronised batch norm replaces them
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def require_stages(self, stages: int) -> None:
        """Raise what `freeze_stages` would raise for a family that cannot freeze stages; freeze nothing."""
        if stages:
            require([cannot_freeze(self.family, (), ("schedule",))])

    def synchronise_batch_norm(self) -> None:
        """Make batch norm take its statistics over all processes that train together, on GPUs; before they begin.

        Each of them must then run every such layer in every step.
        """
        nn.SyncBatchNorm.convert_sync_batchnorm(self)

    @property
    def least_images(self) -> int:
        """Minimum number of images of a training pass, see `defeat.rules.training.least_images`."""
        return least_images(
            normalizes_coarsest_map=self.normalizes_coarsest_map,
            size=self.fixed_size and max(self.fixed_size),
            coarsest_stride=self.strides[-1],
        )

    def compile_trunk(self) -> None:
        """Compile backbone and neck with torch.compile for `maps`, which a training step calls, from the next call on.

        `features`, `detect` and a plain call run uncompiled as before, and parameters keep their names. The weights are
        put into channels_last order, see `Compiled`. If compilation fails, `maps` runs uncompiled, and
        `compilation_failure` gives the reason.
        """
        self._compiled = tuple(Compiled(module, dynamic=self.fixed_size is None) for module in self._compilable())

    def _compilable(self) -> tuple[nn.Module, ...]:
        """Return the modules that `maps` calls, each of which becomes one graph."""
        return (self.backbone,)

    @property
    def compilation_failure(self) -> str | None:
        """Why `maps` no longer runs compiled, in one line; None if it does, or was never compiled."""
        return next((one.failure for one in self._compiled if one.failure is not None), None)

    def features(self, images: Tensor) -> Mapping[str, Tensor]:
        """(B, 3, H, W), normalised and padded -> the pyramid's maps."""
        raise NotImplementedError

    def maps(self, images: Tensor) -> Maps:
        """Return the maps of `features` and the backbone's, of one forward pass."""
        (backbone,) = self._compiled or self._compilable()
        return Maps(features=backbone(images), backbone=None)

    @property
    def backbone_channels(self) -> dict[int, int]:
        """The channels of the backbone's maps by stride; empty for a detector that does not provide "backbone"."""
        return {}

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
