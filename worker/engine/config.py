"""What a distillation run is told: a job's spec, parsed."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from worker.config import Config, with_rules


class ScheduleConfig(Config):
    """How one detector is trained."""

    model_config = with_rules(
        {"key": "decay_epochs", "rule": "below", "other": "epochs"},
        {"key": "decay_epochs", "rule": "only_with", "other": "decay", "value": "step"},
    )

    epochs: Annotated[int, Field(description="Passes over the training split.", ge=1, le=1000)] = 12
    batch_size: Annotated[int, Field(description="Pictures per optimiser step.", ge=1, le=1024)] = 8
    optimizer: Annotated[Literal["sgd", "adamw"], Field(description="SGD with momentum, or AdamW.")] = "sgd"
    learning_rate: Annotated[float, Field(description="Learning rate after warm-up.", gt=0, le=10)] = 0.01
    momentum: Annotated[float, Field(description="SGD's momentum; AdamW's beta 1.", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(description="Weight decay.", ge=0, le=1)] = 1e-4
    warmup_steps: Annotated[int, Field(description="Steps of linear learning-rate warm-up.", ge=0, le=100_000)] = 200
    decay: Annotated[
        Literal["step", "cosine"], Field(description="`step`: x 0.1 at each of decay_epochs; `cosine`: down to 0.")
    ] = "step"
    decay_epochs: Annotated[
        tuple[Annotated[int, Field(ge=1, le=999)], ...],
        Field(description="Epochs after which `step` multiplies by 0.1.", max_length=100),
    ] = ()
    gradient_clip: Annotated[
        float, Field(description="Largest norm of the whole gradient; 0: no clipping.", ge=0, le=1e6)
    ] = 35.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(epoch >= self.epochs for epoch in self.decay_epochs):
            raise ValueError(f"decay_epochs {list(self.decay_epochs)} must be below epochs = {self.epochs}")
        if self.decay_epochs and self.decay != "step":
            raise ValueError(f"decay_epochs belong to decay: step, and decay is {self.decay}")
        return self


class EvaluationConfig(Config):
    """How detectors are measured: COCO's box metrics on one split."""

    split: Annotated[Literal["val", "test", "train"], Field(description="Split to measure on.")] = "val"
    every_epochs: Annotated[int, Field(description="Epochs between two measurements.", ge=1, le=1000)] = 1
    batch_size: Annotated[int, Field(description="Pictures per forward pass.", ge=1, le=256)] = 8
    gallery_images: Annotated[int, Field(description="Pictures kept for the gallery.", ge=0, le=100)] = 12


class AugmentationConfig(Config):
    """Random changes to training pictures, in this order: see `worker.data.augment`."""

    model_config = with_rules({"key": "scale_min", "rule": "at_most", "other": "scale_max"})

    mosaic: Annotated[
        float, Field(description="Probability of putting four pictures together into one.", ge=0, le=1)
    ] = 0.0
    zoom_out: Annotated[
        float, Field(description="Probability of shrinking a picture into a larger, grey one.", ge=0, le=1)
    ] = 0.0
    zoom_out_largest: Annotated[
        float, Field(description="Most times that zoom_out makes width and height larger.", ge=1, le=8)
    ] = 4.0
    iou_crop: Annotated[
        float,
        Field(
            description="Probability of cutting a part out of a picture, by overlap with its boxes, as SSD does.",
            ge=0,
            le=1,
        ),
    ] = 0.0
    horizontal_flip: Annotated[float, Field(description="Probability of mirroring a picture.", ge=0, le=1)] = 0.5
    vertical_flip: Annotated[
        float, Field(description="Probability of turning a picture upside down, as in a mirror.", ge=0, le=1)
    ] = 0.0
    scale_min: Annotated[
        float, Field(description="Least factor, drawn for each picture, of the detector's input size.", ge=0.1, le=4)
    ] = 1.0
    scale_max: Annotated[
        float, Field(description="Largest factor, drawn for each picture, of the detector's input size.", ge=0.1, le=4)
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


class StudentConfig(Config):
    """The student: its detector and where its weights start."""

    detector: dict[str, Any]
    initial_weights: str = "random"


class TeacherConfig(Config):
    """The teacher: trained on the dataset first, a checkpoint, or one of torchvision's pretrained detectors."""

    source: Literal["train", "checkpoint", "pretrained"]
    id: str | None = None
    detector: dict[str, Any] | str
    weights: str | None = None
    initial_weights: str = "random"
    schedule: ScheduleConfig = ScheduleConfig()


class JobConfig(Config):
    """A whole distillation. Names, labels and the dataset's id are the service's business and stay there."""

    teacher: TeacherConfig | None = None
    student: StudentConfig
    distillation: dict[str, Any]
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    @property
    def trains_teacher(self) -> bool:
        """Whether the run trains its teacher first, and so leaves it as an artifact."""
        return self.teacher is not None and self.teacher.source == "train"
