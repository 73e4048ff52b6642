"""The `augmentation` part of a job's spec."""

from typing import Annotated

from pydantic import Field

from defeat.engine.config import Config, with_rules


class AugmentationConfig(Config):
    """Data augmentation: random changes to training images, in this order.

    See `defeat.engine.data.loading.augment`.
    """

    model_config = with_rules({"key": "scale_min", "rule": "at_most", "other": "scale_max"})

    mosaic: Annotated[float, Field(description="Probability of a mosaic of four images.", ge=0, le=1)] = 0.0
    zoom_out: Annotated[
        float, Field(description="Probability of shrinking an image onto a grey canvas.", ge=0, le=1)
    ] = 0.0
    zoom_out_largest: Annotated[
        float, Field(description="Maximum factor of zoom_out, for width and height.", ge=1, le=8)
    ] = 4.0
    iou_crop: Annotated[
        float,
        Field(
            description="Probability of a random crop that keeps a minimum overlap (IoU) with a box, as in SSD.",
            ge=0,
            le=1,
        ),
    ] = 0.0
    horizontal_flip: Annotated[float, Field(description="Probability of a horizontal flip.", ge=0, le=1)] = 0.5
    vertical_flip: Annotated[float, Field(description="Probability of a vertical flip.", ge=0, le=1)] = 0.0
    scale_min: Annotated[
        float, Field(description="Minimum factor of the detector's input size, drawn per image.", ge=0.1, le=4)
    ] = 1.0
    scale_max: Annotated[
        float, Field(description="Maximum factor of the detector's input size, drawn per image.", ge=0.1, le=4)
    ] = 1.0
    brightness: Annotated[float, Field(description="Maximum relative change of brightness.", ge=0, le=1)] = 0.0
    contrast: Annotated[float, Field(description="Maximum relative change of contrast.", ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(description="Maximum relative change of saturation.", ge=0, le=1)] = 0.0
    hue: Annotated[
        float,
        Field(description="Maximum change of hue in either direction; 0.5 is half the colour circle.", ge=0, le=0.5),
    ] = 0.0
