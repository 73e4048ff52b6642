"""Request bodies and responses of datasets."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.http.schemas import AssetStatus, Resource
from app.models import Leased
from app.request_models import Body, Name


class UploadSource(Body):
    """The archive is uploaded in a second request: `PUT /v1/datasets/{id}/content`."""

    kind: Literal["upload"]


class ReferenceSource(Body):
    """A directory or archive on the workers' file system, inside one of the operator's dataset roots."""

    kind: Literal["reference"]
    uri: Annotated[str, Field(max_length=2000, description="`file:///directory` or `file:///archive`.")]


Source = Annotated[UploadSource | ReferenceSource, Field(discriminator="kind")]


class DatasetCreate(Body):
    """A new dataset."""

    name: Name
    source: Source
    max_dropped_fraction: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Largest fraction of annotations and images that may be unusable in a valid dataset.",
        ),
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
    size_bytes: int | None = Field(description="Size of the canonical form, bytes; null until the dataset is ready.")

    @classmethod
    def derived(cls, row: Leased) -> Mapping[str, Any]:
        """See `Resource`."""
        path = f"/v1/datasets/{row.id}"
        return {"links": {"self": path, "content": f"{path}/content", "report": f"{path}/report"}}


class ProblemExample(BaseModel):
    """One occurrence of a problem."""

    file: str
    detail: str


class DatasetProblem(BaseModel):
    """One kind of problem in a dataset."""

    code: str
    severity: Literal["note", "dropped", "fatal"]
    count: int
    summary: str
    examples: list[ProblemExample]


class ClassCounts(BaseModel):
    """Counts of one class by split."""

    name: str
    splits: dict[str, SplitCounts]


class ReportOut(BaseModel):
    """The report of a dataset's check."""

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
