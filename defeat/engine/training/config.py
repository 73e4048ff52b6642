"""The parsed spec of a distillation run."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from defeat.engine.config import Config, with_rules
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.evaluation.config import EvaluationConfig
from defeat.engine.numerics import Precision
from defeat.rules.training import batch_shares


class ScheduleConfig(Config):
    """How one detector is trained."""

    model_config = with_rules(
        {"key": "decay_epochs", "rule": "below", "other": "epochs"},
        {"key": "decay_epochs", "rule": "only_with", "other": "decay", "value": "step"},
        {"key": "accumulation", "rule": "divides", "other": "batch_size"},
    )

    epochs: Annotated[int, Field(description="Number of passes over the training split.", ge=1, le=1000)] = 12
    batch_size: Annotated[int, Field(description="Images per optimiser step, over all GPUs.", ge=1, le=1024)] = 8
    accumulation: Annotated[
        int,
        Field(
            description="Number of equal parts that a batch is processed in, one after the other, with accumulated "
            "gradients. It divides the memory for activations; the learning rate stays the same. It must divide "
            "batch_size.",
            ge=1,
            le=1024,
        ),
    ] = 1
    optimizer: Annotated[Literal["sgd", "adamw"], Field(description="Optimiser: SGD with momentum, or AdamW.")] = "sgd"
    learning_rate: Annotated[float, Field(description="Peak learning rate, after the warm-up.", gt=0, le=10)] = 0.01
    momentum: Annotated[float, Field(description="Momentum of SGD, or beta 1 of AdamW.", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(description="Weight decay coefficient.", ge=0, le=1)] = 1e-4
    norm_weight_decay: Annotated[
        bool, Field(description="Apply weight decay to normalisation parameters and biases as well.")
    ] = True
    warmup_steps: Annotated[
        int, Field(description="Steps of linear learning-rate warm-up; ignored by `one_cycle`.", ge=0, le=100_000)
    ] = 200
    decay: Annotated[
        Literal["step", "cosine", "one_cycle"],
        Field(
            description="Learning-rate schedule. `step`: multiply by 0.1 at each of decay_epochs. `cosine`: cosine "
            "decay to 0. `one_cycle`: rise from 1/25 of the peak over the first 30 % of the steps, then fall to "
            "1/250,000 of it, both along half cosines."
        ),
    ] = "step"
    decay_epochs: Annotated[
        tuple[Annotated[int, Field(ge=1, le=999)], ...],
        Field(description="Epochs after which `step` multiplies the learning rate by 0.1.", max_length=100),
    ] = ()
    gradient_clip: Annotated[
        float,
        Field(
            description="Maximum gradient norm. The detector's gradient and that of the method's adapters are clipped "
            "separately. 0: no clipping.",
            ge=0,
            le=1e6,
        ),
    ] = 35.0
    ema_decay: Annotated[
        float,
        Field(
            description="Decay of an exponential moving average (EMA) of the weights, which is then evaluated and "
            "saved instead of the weights. It rises from 0.1 as (1 + step) / (10 + step). 0: no average.",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    patience: Annotated[
        int,
        Field(
            description="Early stopping: evaluations without a better AP after which training ends. 0: off.",
            ge=0,
            le=1000,
        ),
    ] = 0
    precision: Annotated[
        Precision,
        Field(
            description="Precision of the forward passes; weights and losses stay float32. `tf32`: float32 with "
            "TensorFloat-32 products (10 bits of mantissa) on GPUs that have them; on a CPU the same as `float32`. "
            "`float32`: full float32 products. `bfloat16`, `float16`: autocast; `float16` also scales the loss and "
            "skips steps whose gradients overflow."
        ),
    ] = "tf32"
    channels_last: Annotated[
        bool, Field(description="Keep feature maps in NHWC memory order: faster on tensor cores with half precision.")
    ] = False
    compile: Annotated[
        bool,
        Field(
            description="Compile the backbones and pyramids of student and teacher with torch.compile. The start takes "
            "minutes longer, and each step is faster. What cannot be compiled runs uncompiled, with a warning."
        ),
    ] = False
    frozen_stages: Annotated[
        int,
        Field(
            description="Number of backbone stages, counted from the stem, whose weights are not trained. 1: up to "
            "stride 4. 4: the whole backbone.",
            ge=0,
            le=4,
        ),
    ] = 0
    frozen_statistics: Annotated[
        bool,
        Field(
            description="Keep the running statistics of the backbone's batch norm at their initial values, and train "
            "its scale and shift, as the DeFeat authors do with ImageNet weights."
        ),
    ] = False
    sync_batch_norm: Annotated[
        bool,
        Field(description="With several GPUs: compute batch norm over the whole batch instead of each GPU's share."),
    ] = False
    checkpoint_minutes: Annotated[
        float,
        Field(
            description="Maximum minutes between two training checkpoints within an epoch. Every epoch ends with one.",
            gt=0,
            le=1440,
        ),
    ] = 10.0


class ResourcesConfig(Config):
    """The hardware that a job asks for."""

    gpus: Annotated[
        int,
        Field(
            description="Number of GPUs of one machine that train together, each on its share of every batch. On a "
            "worker without a GPU: the number of processes.",
            ge=1,
            le=64,
        ),
    ] = 1
    gpu_memory_gb: Annotated[
        float | None,
        Field(
            description="Minimum memory of each GPU, GB. The job waits for a worker with such GPUs. Null: any worker, "
            "including one without a GPU.",
            gt=0,
            le=10_000,
        ),
    ] = None
    label: Annotated[
        str | None,
        Field(
            description="Label of the worker to run on: letters, digits and `._-`. Null: any worker.",
            pattern=r"^[A-Za-z0-9._-]{1,50}$",
        ),
    ] = None


class StudentConfig(Config):
    """The student: its detector spec, and its initial weights (`random`, `imagenet` or a checkpoint's id)."""

    detector: dict[str, Any]
    initial_weights: str = "random"


class TrainedTeacherConfig(Config):
    """A teacher that the run trains on the dataset first; see `StudentConfig` for its detector and weights."""

    source: Literal["train"]
    detector: dict[str, Any]
    initial_weights: str = "random"
    schedule: ScheduleConfig = ScheduleConfig()


ClassMap = Annotated[
    dict[str, str],
    Field(
        description="The teacher's name of a class by the dataset's name; classes that are left out have the same.",
        default_factory=dict,
    ),
]


class CheckpointTeacherConfig(Config):
    """A teacher from a checkpoint, whose file is among the run's inputs.

    The service records the checkpoint's id and detector spec in the job; the run reads both from the file.
    """

    source: Literal["checkpoint"]
    id: str
    detector: dict[str, Any] | None = None
    class_map: ClassMap


class PretrainedTeacherConfig(Config):
    """One of torchvision's pretrained detectors, by the names of the detector and of its weights."""

    source: Literal["pretrained"]
    detector: str
    weights: str
    class_map: ClassMap


TeacherConfig = TrainedTeacherConfig | CheckpointTeacherConfig | PretrainedTeacherConfig


class JobConfig(Config):
    """A whole distillation, without the keys that only the service reads (`distill.SERVICE_KEYS`)."""

    teacher: TeacherConfig | None = Field(None, discriminator="source")
    student: StudentConfig
    distillation: dict[str, Any] | list[dict[str, Any]]
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        schedules = {"schedule": self.schedule}
        if isinstance(self.teacher, TrainedTeacherConfig):
            schedules["teacher.schedule"] = self.teacher.schedule
        for name, schedule in schedules.items():
            for finding in batch_shares(
                schedule.batch_size,
                gpus=self.resources.gpus,
                accumulation=schedule.accumulation,
                where=tuple(name.split(".")),
            ):
                raise ValueError(f"{'.'.join(map(str, finding.path))}: {finding.detail}")
        return self

    @property
    def trains_teacher(self) -> bool:
        """Whether the run trains its teacher first, and writes it as an artifact."""
        return isinstance(self.teacher, TrainedTeacherConfig)
