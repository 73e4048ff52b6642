"""A detector family's description of itself: everything that the registry and the catalog must know of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchvision.models import WeightsEnum

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, HeadKind, Part
from defeat.rules.anchors import AnchorSizes


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published detector of the family: the config that its weights fit, and the weights by name."""

    config: Config
    weights: Mapping[str, WeightsEnum]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One detector family.

    The fields of its config state what they decide, see `detectors.config.decides`. Class attributes of its detector
    state what it can do.

    Attributes:
        summary: one line for the catalog.
        config: its config, with the keys `architecture`, the family's name; `backbone`; `strides`, those of the levels
            without extra ones; and `size` if images are resized to a square.
        detector: called as `detector(config, classes, pretrained_backbone=False)`.
        anchors: how it computes the sizes of its anchors; None if it provides neither "anchors" nor "logits".
        published: detectors whose trained weights can be downloaded, by name.
    """

    summary: str
    config: type[Config]
    detector: type[Detector]
    anchors: AnchorSizes | None = None
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The value of `architecture` that picks it."""
        return str(self.config.model_fields["architecture"].default)

    @property
    def head(self) -> HeadKind:
        """See `Detector.head_kind`."""
        return self.detector.head_kind

    @property
    def provides(self) -> tuple[Part, ...]:
        """See `Detector.provides`."""
        return self.detector.provides

    def build(self, config: Config, classes: Sequence[str], *, pretrained_backbone: bool = False) -> Detector:
        """Build a detector; see `Detector.__init__`."""
        return self.detector(config, classes, pretrained_backbone=pretrained_backbone)
