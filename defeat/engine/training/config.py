"""The parsed spec of a distillation run."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from defeat.engine.config import Config, with_rules
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.evaluation.config import EvaluationConfig
from defeat.engine.numerics import Precision


class ScheduleConfig(Config):
    """How one detector is trained."""

    model_config = with_rules(
        {"key": "decay_epochs", "rule": "below", "other": "epochs"},
        {"key": "decay_epochs", "rule": "only_with", "other": "decay", "value": "step"},
        {"key": "accumulation", "rule": "divides", "other": "batch_size"},
    )

    epochs: Annotated[int, Field(description="Passes over the training split.", ge=1, le=1000)] = 12
    batch_size: Annotated[int, Field(description="Images per optimiser step, on all GPUs together.", ge=1, le=1024)] = 8
    accumulation: Annotated[
        int,
        Field(
            description="Equal parts that a batch is cut into, one after the other, their gradients added up: as many "
            "times less memory, the same learning rate. It must divide batch_size.",
            ge=1,
            le=1024,
        ),
    ] = 1
    optimizer: Annotated[Literal["sgd", "adamw"], Field(description="SGD with momentum, or AdamW.")] = "sgd"
    learning_rate: Annotated[float, Field(description="Highest learning rate, after warm-up.", gt=0, le=10)] = 0.01
    momentum: Annotated[float, Field(description="SGD's momentum; AdamW's beta 1.", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(description="Weight decay.", ge=0, le=1)] = 1e-4
    norm_weight_decay: Annotated[
        bool, Field(description="Apply weight decay to the parameters of norms and to biases, too.")
    ] = True
    warmup_steps: Annotated[
        int, Field(description="Steps of linear learning-rate warm-up; not with `one_cycle`.", ge=0, le=100_000)
    ] = 200
    decay: Annotated[
        Literal["step", "cosine", "one_cycle"],
        Field(
            description="`step`: x 0.1 at each of decay_epochs; `cosine`: down to 0; `one_cycle`: by half cosines up "
            "from 1/25 over the first 30 % of the steps, then down to 1/250,000."
        ),
    ] = "step"
    decay_epochs: Annotated[
        tuple[Annotated[int, Field(ge=1, le=999)], ...],
        Field(description="Epochs after which `step` multiplies by 0.1.", max_length=100),
    ] = ()
    gradient_clip: Annotated[
        float,
        Field(
            description="Largest norm of the detector's gradient, and of the method's own (its adapters'), each by "
            "itself; 0: no clipping.",
            ge=0,
            le=1e6,
        ),
    ] = 35.0
    ema_decay: Annotated[
        float,
        Field(
            description="Decay of an exponential moving average of the weights, which is then what is measured and "
            "kept; it rises from 0.1 as (1 + step) / (10 + step). 0: none.",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    patience: Annotated[
        int, Field(description="Measurements without a better AP after which training ends; 0: never.", ge=0, le=1000)
    ] = 0
    precision: Annotated[
        Precision,
        Field(
            description="Of the forward passes; weights and losses stay float32. `tf32`: float32, whose products a GPU "
            "makes with 10 bits of mantissa where it can; on a CPU the same as `float32`. `float32`: exact products. "
            "`bfloat16`, `float16`: by autocast; `float16` scales its losses and leaves out steps whose gradients "
            "overflow."
        ),
    ] = "tf32"
    channels_last: Annotated[
        bool, Field(description="Keep maps in NHWC order, which tensor cores want; for GPUs, with half precision.")
    ] = False
    compile: Annotated[
        bool,
        Field(
            description="Compile the trunks of student and teacher with torch.compile: minutes at the start, then "
            "faster steps. A trunk that cannot be compiled runs as it is, with a warning."
        ),
    ] = False
    frozen_stages: Annotated[
        int,
        Field(
            description="Stages of the backbone, from the stem on (1: up to stride 4, 4: all of it), whose weights "
            "stay as they start.",
            ge=0,
            le=4,
        ),
    ] = 0
    frozen_statistics: Annotated[
        bool,
        Field(
            description="Keep the running statistics of the backbone's batch norm as they start, and train its scale "
            "and shift, as the DeFeat authors do with ImageNet weights."
        ),
    ] = False
    sync_batch_norm: Annotated[
        bool, Field(description="With several GPUs: batch norm over the whole batch, not over each GPU's share.")
    ] = False
    checkpoint_minutes: Annotated[
        float,
        Field(
            description="Most minutes between two training checkpoints inside an epoch; each epoch ends with one.",
            gt=0,
            le=1440,
        ),
    ] = 10.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(epoch >= self.epochs for epoch in self.decay_epochs):
            raise ValueError(f"decay_epochs {list(self.decay_epochs)} must be below epochs = {self.epochs}")
        if self.decay_epochs and self.decay != "step":
            raise ValueError(f"decay_epochs belong to decay: step, and decay is {self.decay}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} must divide batch_size = {self.batch_size}")
        return self


class ResourcesConfig(Config):
    """What a job is given to run on."""

    gpus: Annotated[
        int,
        Field(
            description="GPUs of one machine that train together, each its share of every batch; as many processes "
            "on a worker that has no GPU.",
            ge=1,
            le=64,
        ),
    ] = 1
    gpu_memory_gb: Annotated[
        float | None,
        Field(
            description="Least memory of each GPU, GB; the job then waits for a worker with such GPUs. Null: any "
            "worker, also one without a GPU.",
            gt=0,
            le=10_000,
        ),
    ] = None
    label: Annotated[
        str | None,
        Field(
            description="The job runs on a worker that has this label: letters, digits and `._-`. Null: on any.",
            pattern=r"^[A-Za-z0-9._-]{1,50}$",
        ),
    ] = None


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
    class_map: Annotated[
        dict[str, str],
        Field(
            description="The teacher's name of a class by the dataset's; the others map to themselves.",
            default_factory=dict,
        ),
    ]
    initial_weights: str = "random"
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.class_map and self.source == "train":
            raise ValueError("class_map belongs to the sources checkpoint and pretrained; this teacher is trained here")
        return self


class JobConfig(Config):
    """A whole distillation. Names, labels and the dataset's id are the service's business and stay there."""

    teacher: TeacherConfig | None = None
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
        if self.teacher is not None and self.trains_teacher:
            schedules["teacher.schedule"] = self.teacher.schedule
        for name, schedule in schedules.items():
            shares = self.resources.gpus * schedule.accumulation
            if schedule.batch_size % shares:
                raise ValueError(
                    f"{name}.batch_size {schedule.batch_size} must be a multiple of gpus x accumulation = {shares}"
                )
        return self

    @property
    def trains_teacher(self) -> bool:
        """Whether the run trains its teacher first, and so leaves it as an artifact."""
        return self.teacher is not None and self.teacher.source == "train"
