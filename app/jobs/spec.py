"""A job's spec as it is sent: the outer keys. What hangs on the engine is checked against the catalog's schemas."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from app.bodies import Body, Name

Parameters = Annotated[dict[str, Any], Field(default_factory=dict)]


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not 1 <= len(key) <= 50 or len(value) > 200 or not (key + value).isprintable():
            raise PydanticCustomError(
                "out_of_range", "a label has a key of 1 to 50 and a value of at most 200 printable characters"
            )
    return labels


def _initial_weights(value: str) -> str:
    if value not in ("random", "imagenet") and not value.startswith("ckpt_"):
        raise PydanticCustomError(
            "unknown_weights", "unknown initial weights; known: random, imagenet, or a checkpoint's id (ckpt_…)"
        )
    return value


InitialWeights = Annotated[
    str,
    Field(max_length=40, description="`random`, `imagenet` (the backbone only) or a checkpoint's id."),
    AfterValidator(_initial_weights),
]


class TrainedTeacher(Body):
    """A teacher that the job trains on the dataset first, and keeps as a checkpoint."""

    source: Literal["train"]
    detector: dict[str, Any] = Field(description="A detector spec; see `detectors` in the catalog.")
    initial_weights: InitialWeights = "random"
    schedule: Parameters


class CheckpointTeacher(Body):
    """A teacher from a checkpoint."""

    source: Literal["checkpoint"]
    id: str = Field(max_length=40)
    detector: dict[str, Any] | None = Field(
        None, description="The checkpoint's own, filled in by the service; may be left out."
    )


class PretrainedTeacher(Body):
    """A published detector."""

    source: Literal["pretrained"]
    detector: str = Field(max_length=200, description="Its name; see `pretrained` in the catalog.")
    weights: str = Field(max_length=200)


class StudentSpec(Body):
    """The detector that is wanted."""

    detector: dict[str, Any] = Field(description="A detector spec; see `detectors` in the catalog.")
    initial_weights: InitialWeights = "random"


class JobSpec(Body):
    """What a job is asked to do. A key that is left out takes its default."""

    name: Name
    labels: Annotated[dict[str, str], Field(default_factory=dict, max_length=20), AfterValidator(_labels)]
    dataset: str = Field(max_length=40, description="A dataset's id.")
    teacher: TrainedTeacher | CheckpointTeacher | PretrainedTeacher | None = Field(
        None, discriminator="source", description="Null for methods that need none."
    )
    student: StudentSpec
    distillation: dict[str, Any] = Field(description="`method` and its parameters; see `methods` in the catalog.")
    schedule: Parameters
    evaluation: Parameters
    augmentation: Parameters
    resources: Parameters
    seed: int = Field(0, ge=0, le=2**31 - 1)
