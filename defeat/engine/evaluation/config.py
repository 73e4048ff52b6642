"""The `evaluation` part of a job's spec."""

from typing import Annotated, Literal

from pydantic import Field

from defeat.engine.config import Config


class EvaluationConfig(Config):
    """How detectors are measured: COCO's box metrics on one split."""

    split: Annotated[Literal["val", "test", "train"], Field(description="Split to measure on.")] = "val"
    every_epochs: Annotated[int, Field(description="Epochs between two measurements.", ge=1, le=1000)] = 1
    batch_size: Annotated[int, Field(description="Images per forward pass.", ge=1, le=256)] = 8
    gallery_images: Annotated[int, Field(description="Images kept for the gallery.", ge=0, le=100)] = 12
