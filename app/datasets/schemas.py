"""Bodies and responses of datasets."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.http.schemas import AssetStatus, Resource
from app.models import Leased
from app.request_models import Body, Name


class UploadSource(Body):
    """The archive comes in a request of its own: `PUT /v1/datasets/{id}/content`."""

    kind: Literal["upload"]


class ReferenceSource(Body):
    """A directory or archive that the workers can read, inside one of the operator's dataset roots."""

    kind: Literal["reference"]
    uri: Annotated[str, Field(max_length=2000, description="`file:///directory` or `file:///archive`.")]


Source = Annotated[UploadSource | ReferenceSource, Field(discriminator="kind")]


class DatasetCreate(Body):
    """A dataset to be made."""

    name: Name
    source: Source
    max_dropped_fraction: Annotated[
        float,
        Field(ge=0, le=1, description="Share of bad annotations and images above which the dataset is invalid."),
    ] = 0.05


class SplitCounts(BaseModel):
    """Size of one split."""

    images: int
    boxes: int


class DatasetOut(Resource):
    """A dataset."""

    object: Literal["dataset"] = "dataset"
    status: AssetStatus
    source: Source
    max_dropped_fraction: float
    format: str | None
    classes: list[str] | None
    splits: dict[str, SplitCounts] | None
    content_hash: str | None
    size_bytes: int | None = Field(description="Of the canonical form, once ready.")

    @classmethod
    def derived(cls, row: Leased) -> Mapping[str, Any]:
        """See `Resource`."""
        path = f"/v1/datasets/{row.id}"
        return {"links": {"self": path, "content": f"{path}/content", "report": f"{path}/report"}}


class ProblemExample(BaseModel):
    """One place where a problem was found."""

    file: str
    detail: str


class DatasetProblem(BaseModel):
    """One kind of problem that was found in a dataset."""

    code: str
    severity: Literal["note", "dropped", "fatal"]
    count: int
    summary: str
    examples: list[ProblemExample]


class ClassCounts(BaseModel):
    """Where one class occurs."""

    name: str
    splits: dict[str, SplitCounts]


class ReportOut(BaseModel):
    """What checking a dataset found."""

    model_config = ConfigDict(extra="allow")

    format: str | None = None
    images: int | None = None
    boxes: int | None = None
    masks: int | None = Field(None, description="Boxes that have an instance mask; null in reports of older releases.")
    classes: list[ClassCounts] = []
    splits: dict[str, SplitCounts] = {}
    problems: list[DatasetProblem] = []
    dropped_fraction: float | None = None
    max_dropped_fraction: float | None = None
