"""Detectors whose backbone is a `Pyramid`: their backbone's maps can be compared, and its stages frozen."""

from typing import cast

from torch import Tensor, nn

from defeat.engine.detectors.backbones import Pyramid
from defeat.engine.detectors.base import Detector, Maps


class PyramidDetector(Detector):
    """Implements what `Detector` leaves to families, for those that have "backbone" in `provides`."""

    def freeze_stages(self, stages: int) -> None:
        """See `Detector.freeze_stages`, and `Pyramid.freeze`."""
        if stages:
            self.pyramid.freeze(stages)
            self.train(self.training)  # `Pyramid.freeze` knows nothing of frozen statistics

    def require_stages(self, stages: int) -> None:
        """See `Detector.require_stages`. A pyramid has stages."""

    @property
    def pyramid(self) -> Pyramid:
        """The backbone and its FPN."""
        return cast(Pyramid, self.backbone)

    def _compilable(self) -> tuple[nn.Module, ...]:
        # Two graphs: a measured step also asks for gradients from the pyramid's maps back to the backbone's, which
        # lead through the second alone.
        return self.pyramid.body, self.pyramid.fpn

    def maps(self, images: Tensor) -> Maps:
        """See `Detector.maps`."""
        body, fpn = self._compiled or self._compilable()
        stages = body(images)
        # The strides of the backbone's maps come first; those of the extra levels have no map there.
        return Maps(features=fpn(stages), backbone=dict(zip(self.pyramid.strides, stages.values(), strict=False)))

    @property
    def backbone_channels(self) -> dict[int, int]:
        """See `Detector.backbone_channels`."""
        inner = [block[0].in_channels for block in self.pyramid.fpn.inner_blocks]
        return dict(zip(self.pyramid.strides, inner, strict=False))
