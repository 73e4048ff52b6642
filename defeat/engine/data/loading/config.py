"""The `augmentation` part of a job's spec."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from defeat.engine.config import Config, with_rules


class AugmentationConfig(Config):
    """Random changes to training images, in this order: see `defeat.engine.data.loading.augment`."""

    model_config = with_rules({"key": "scale_min", "rule": "at_most", "other": "scale_max"})

    mosaic: Annotated[float, Field(description="Probability of putting four images together into one.", ge=0, le=1)] = (
        0.0
    )
    zoom_out: Annotated[
        float, Field(description="Probability of shrinking an image into a larger, grey one.", ge=0, le=1)
    ] = 0.0
    zoom_out_largest: Annotated[
        float, Field(description="Most times that zoom_out makes width and height larger.", ge=1, le=8)
    ] = 4.0
    iou_crop: Annotated[
        float,
        Field(
            description="Probability of cutting a part out of an image, by overlap with its boxes, as SSD does.",
            ge=0,
            le=1,
        ),
    ] = 0.0
    horizontal_flip: Annotated[float, Field(description="Probability of mirroring an image.", ge=0, le=1)] = 0.5
    vertical_flip: Annotated[
        float, Field(description="Probability of turning an image upside down, as in a mirror.", ge=0, le=1)
    ] = 0.0
    scale_min: Annotated[
        float, Field(description="Least factor, drawn for each image, of the detector's input size.", ge=0.1, le=4)
    ] = 1.0
    scale_max: Annotated[
        float, Field(description="Largest factor, drawn for each image, of the detector's input size.", ge=0.1, le=4)
    ] = 1.0
    brightness: Annotated[float, Field(description="Most change of brightness, as a share of it.", ge=0, le=1)] = 0.0
    contrast: Annotated[float, Field(description="Most change of contrast, as a share of it.", ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(description="Most change of saturation, as a share of it.", ge=0, le=1)] = 0.0
    hue: Annotated[
        float, Field(description="Most turn of the hues, either way; 0.5 is half their circle.", ge=0, le=0.5)
    ] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} is more than scale_max {self.scale_max}")
        return self
