"""What the configs of all families share: the pyramid, the size of images, how detections are kept, what fields decide.

A field states in its JSON Schema what it decides of the detector. From that alone the service checks whether weights
fit, levels pair and anchors are alike:

- `x-decides`, see `Decides`;
- `x-extra-levels`: for each of its values, the levels that are added above the backbone's, see `ExtraLevel`;
- `x-anchors`: it multiplies the anchors of a cell, a number by its value, a list by its length;
- `x-not-with-imagenet`: while the flag is on, the backbone cannot start from ImageNet weights.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator
from torchvision.models.detection._utils import overwrite_eps

from defeat.engine.config import Config, with_rules
from defeat.engine.detectors.backbones import (
    BACKBONES,
    EXTRA_LEVELS,
    STRIDES,
    ExtraLevels,
    Pyramid,
    build_pyramid,
)

Decides = Literal["tensors", "levels", "channels", "anchors", "maps"]
"""What a field decides: `tensors`, names or shapes of the detector's parameters and buffers, whatever the other fields
are; `levels`, the strides of its pyramid; `channels`, those of each level; `anchors`, the anchors of each cell; `maps`,
the shapes of the maps."""


def decides(
    *what: Decides, multiplies_anchors: bool = False, not_with_imagenet: bool = False, enum: list[Any] | None = None
) -> dict[str, JsonValue]:
    """Return the `json_schema_extra` of a field that decides `what`; `enum`: all of its values."""
    extra: dict[str, JsonValue] = {"x-decides": list(what)}
    if multiplies_anchors:
        extra["x-anchors"] = "multiplies"
    if not_with_imagenet:
        extra["x-not-with-imagenet"] = True
    return extra if enum is None else extra | {"enum": enum}


def adds_levels(values: Mapping[str | bool, ExtraLevels]) -> dict[str, JsonValue]:
    """Return the `json_schema_extra` of a field whose values add levels to the pyramid."""
    entries: list[JsonValue] = [
        {"value": value, "factors": list(EXTRA_LEVELS[name].factors), "convolves": EXTRA_LEVELS[name].convolves}
        for value, name in values.items()
    ]
    return {"x-decides": ["levels"], "x-extra-levels": entries}


_CONSECUTIVE: list[Any] = [
    list(STRIDES[first:last]) for first in range(len(STRIDES)) for last in range(first + 1, len(STRIDES) + 1)
]
Strides = Annotated[
    tuple[Literal[4, 8, 16, 32], ...],
    Field(
        description="Strides of the backbone's levels in the pyramid in pixels, consecutive.",
        min_length=1,
        max_length=4,
        json_schema_extra=decides("levels", "tensors", enum=_CONSECUTIVE),
    ),
]
AnchorRatios = Annotated[
    tuple[Annotated[float, Field(gt=0, le=20)], ...],
    Field(
        description="Aspect ratios of the anchors, height over width.",
        min_length=1,
        max_length=9,
        json_schema_extra=decides("anchors", multiplies_anchors=True),
    ),
]
ScoreThreshold = Annotated[float, Field(description="Minimum score of a detection.", ge=0, lt=1)]
NmsThreshold = Annotated[
    float, Field(description="IoU above which non-maximum suppression drops the lower-scored box.", gt=0, lt=1)
]
MaxDetections = Annotated[int, Field(description="Maximum number of detections per image.", ge=1, le=1000)]


class PyramidConfig(Config):
    """A detector on a backbone with a feature pyramid. A default that differs between families is the family's own."""

    model_config = with_rules({"key": "min_size", "rule": "at_most", "other": "max_size"})

    backbone: Annotated[str, Field(description="Backbone by name.", json_schema_extra={"enum": list(BACKBONES)})]
    strides: Strides = (4, 8, 16, 32)
    pyramid_channels: Annotated[
        int,
        Field(
            description="Channels of every pyramid level.",
            ge=8,
            le=1024,
            json_schema_extra=decides("channels", "tensors"),
        ),
    ] = 256
    min_size: Annotated[int, Field(description="Shorter side of a resized image, px.", ge=32, le=4096)] = 800
    max_size: Annotated[int, Field(description="Maximum longer side of a resized image, px.", ge=32, le=8192)] = 1333
    frozen_batch_norm: Annotated[
        bool,
        Field(
            description="Freeze the backbone's batch norm; for pretrained weights and small batches. No effect on "
            "backbones without batch norm, such as ConvNeXt and Swin."
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
