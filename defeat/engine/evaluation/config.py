"""The `evaluation` part of a job's spec."""

from typing import Annotated, Literal

from pydantic import Field

from defeat.engine.config import Config


class EvaluationConfig(Config):
    """How detectors are evaluated: COCO's metrics on one split."""

    split: Annotated[Literal["val", "test", "train"], Field(description="Split to evaluate on.")] = "val"
    every_epochs: Annotated[int, Field(description="Epochs between two evaluations.", ge=1, le=1000)] = 1
    batch_size: Annotated[int, Field(description="Batch size per forward pass.", ge=1, le=256)] = 8
    gallery_images: Annotated[int, Field(description="Number of images in the gallery.", ge=0, le=100)] = 12
