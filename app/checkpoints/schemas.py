"""Request bodies and responses of checkpoints."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from app.http.schemas import AssetStatus, Resource
from app.models import Leased
from app.request_models import Body, Name


def _distinct(classes: list[str] | None) -> list[str] | None:
    twice = next((name for name, count in Counter(classes).items() if count > 1), None)
    if twice is not None:
        raise PydanticCustomError(
            "duplicate_class", "class {name} occurs twice; name each class once", {"name": repr(twice)}
        )
    return classes


class CheckpointCreate(Body):
    """A new checkpoint. Its weights are uploaded next: `PUT /v1/checkpoints/{id}/content`."""

    name: Name
    detector: Annotated[
        dict[str, Any] | None,
        Field(description="Detector spec of the weights; null: the file's header has it."),
    ] = None
    classes: Annotated[
        list[Name] | None,
        Field(
            min_length=1,
            max_length=10_000,
            description="Class names in the order of the weights' labels; null: the file's header has them.",
        ),
        AfterValidator(_distinct),
    ] = None


class Coverage(BaseModel):
    """How many of the detector's tensors the file has, and the first 20 names of those that do not match."""

    loaded: int
    total: int
    missing: list[str] = []
    unexpected: list[str] = []


class CheckpointOut(Resource):
    """A checkpoint."""

    object: Literal["checkpoint"] = "checkpoint"
    status: AssetStatus
    detector: dict[str, Any] | None
    classes: list[str] | None
    coverage: Coverage | None
    sha256: str | None
    size_bytes: int | None
    source_job_id: str | None

    @classmethod
    def derived(cls, row: Leased) -> Mapping[str, Any]:
        """See `Resource`."""
        path = f"/v1/checkpoints/{row.id}"
        return {"links": {"self": path, "content": f"{path}/content"}}
