"""A job's spec as it is sent: the outer keys. The catalog's schemas check the keys that the engine defines."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.request_models import Body, Name
from defeat.rules import show

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


def _object_or_list(value: Any) -> Any:
    # Here: as a union, pydantic would report it once for each of its types.
    if not isinstance(value, (dict, list)):
        raise PydanticCustomError(
            "wrong_type", "it must be an object, or a list of objects; got {given}", {"given": show(value)}
        )
    return value


Distillation = Annotated[
    dict[str, Any] | list[Annotated[Any, WithJsonSchema({"type": "object"})]],
    Field(
        description="`method` and its parameters, see `methods` in the catalog; or a list of at least two of these, "
        "each also with a `weight`, see `combination` there."
    ),
    BeforeValidator(_object_or_list),
]

InitialWeights = Annotated[
    str,
    Field(max_length=40, description="`random`, `imagenet` (the backbone only) or a checkpoint's id."),
    AfterValidator(_initial_weights),
]


ClassMap = Annotated[
    dict[Annotated[str, Field(max_length=200)], Annotated[str, Field(max_length=200)]],
    Field(
        default_factory=dict,
        max_length=10_000,
        description="The teacher's name of a class by the dataset's name, for classes whose names differ; the others "
        "map to themselves. No class of the teacher may stand for two.",
    ),
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
    class_map: ClassMap


class PretrainedTeacher(Body):
    """A published detector."""

    source: Literal["pretrained"]
    detector: str = Field(max_length=200, description="Its name; see `pretrained` in the catalog.")
    weights: str = Field(max_length=200)
    class_map: ClassMap


class StudentSpec(Body):
    """The detector that the job trains."""

    detector: dict[str, Any] = Field(description="A detector spec; see `detectors` in the catalog.")
    initial_weights: InitialWeights = "random"


class JobSpec(Body):
    """The spec of a job. A missing key takes its default."""

    name: Name
    labels: Annotated[dict[str, str], Field(default_factory=dict, max_length=20), AfterValidator(_labels)]
    dataset: str = Field(max_length=40, description="A dataset's id.")
    teacher: TrainedTeacher | CheckpointTeacher | PretrainedTeacher | None = Field(
        None, discriminator="source", description="Null for methods that need none."
    )
    student: StudentSpec
    distillation: Distillation
    schedule: Parameters
    evaluation: Parameters
    augmentation: Parameters
    resources: Parameters
    seed: int = Field(0, ge=0, le=2**31 - 1)
