"""What the configs of all families share: the pyramid, the size of images, and how detections are kept."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from torchvision.models.detection._utils import overwrite_eps

from defeat.engine.config import Config, with_rules
from defeat.engine.detectors.backbones import BACKBONES, STRIDES, ExtraLevels, Pyramid, build_pyramid

_CONSECUTIVE: list[Any] = [
    list(STRIDES[first:last]) for first in range(len(STRIDES)) for last in range(first + 1, len(STRIDES) + 1)
]
Strides = Annotated[
    tuple[Literal[4, 8, 16, 32], ...],
    Field(
        description="Strides of the backbone's levels in the pyramid in pixels, consecutive.",
        min_length=1,
        max_length=4,
        json_schema_extra={"enum": _CONSECUTIVE},
    ),
]
AnchorRatios = Annotated[
    tuple[Annotated[float, Field(gt=0, le=20)], ...],
    Field(description="Height over width of the anchors.", min_length=1, max_length=9),
]
ScoreThreshold = Annotated[float, Field(description="Least score of a detection.", ge=0, lt=1)]
NmsThreshold = Annotated[float, Field(description="IoU above which the weaker box goes.", gt=0, lt=1)]
MaxDetections = Annotated[int, Field(description="Most detections per image.", ge=1, le=1000)]


class PyramidConfig(Config):
    """A detector on a backbone with a feature pyramid. A default that is not the same in all families is theirs."""

    model_config = with_rules({"key": "min_size", "rule": "at_most", "other": "max_size"})

    backbone: Annotated[str, Field(description="Backbone by name.", json_schema_extra={"enum": list(BACKBONES)})]
    strides: Strides = (4, 8, 16, 32)
    pyramid_channels: Annotated[int, Field(description="Channels of every pyramid level.", ge=8, le=1024)] = 256
    min_size: Annotated[int, Field(description="Shorter side of a resized image, px.", ge=32, le=4096)] = 800
    max_size: Annotated[int, Field(description="Most that its longer side may become, px.", ge=32, le=8192)] = 1333
    frozen_batch_norm: Annotated[
        bool,
        Field(
            description="Fix the backbone's batch norm; for pretrained weights and small batches. Of no effect on "
            "backbones that have none, such as ConvNeXt and Swin."
        ),
    ] = False
    batch_norm_epsilon: Annotated[
        float | None,
        Field(
            description="Epsilon of frozen batch norm; null: the library's. COCO_V1 weights of Faster R-CNN and "
            "RetinaNet need 0.",
            ge=0,
            le=0.1,
        ),
    ] = None

    @field_validator("strides")
    @classmethod
    def _check_strides(cls, strides: tuple[Literal[4, 8, 16, 32], ...]) -> tuple[Literal[4, 8, 16, 32], ...]:
        first = STRIDES.index(strides[0])
        if strides != STRIDES[first : first + len(strides)]:
            raise ValueError(f"strides must be consecutive and rising, out of {STRIDES}; got {strides}")
        return strides

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.max_size < self.min_size:
            raise ValueError(f"max_size {self.max_size} is less than min_size {self.min_size}")
        return self

    def build_pyramid(self, extra_levels: ExtraLevels, *, pretrained: bool, batch_norm: bool = False) -> Pyramid:
        """Build the backbone and its pyramid, see `backbones.build_pyramid`; `batch_norm`: of the pyramid's own."""
        pyramid = build_pyramid(
            self.backbone,
            strides=self.strides,
            channels=self.pyramid_channels,
            extra_levels=extra_levels,
            pretrained=pretrained,
            frozen_batch_norm=self.frozen_batch_norm,
            pyramid_batch_norm=batch_norm,
        )
        if self.batch_norm_epsilon is not None:
            overwrite_eps(pyramid, self.batch_norm_epsilon)
        return pyramid
