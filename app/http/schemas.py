"""Response models that several resources share."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app.models import Leased

AssetStatus = Literal["awaiting_upload", "queued", "checking", "ready", "invalid", "failed"]


class Failure(BaseModel):
    """Why a row failed. `class`: user (the spec), data (the input), oom (out of memory), infra (machine or network)."""

    model_config = ConfigDict(populate_by_name=True)

    class_: str = Field(alias="class")
    code: str
    detail: str
    log_tail: list[str] = []


class Resource(BaseModel):
    """The members that every resource has, from its row's columns and from `derived`."""

    model_config = ConfigDict(from_attributes=True)

    # Declared here and narrowed by each resource, so that they come first in its JSON.
    id: str
    object: str
    name: str
    status: str
    failure: Failure | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: dict[str, str]

    @classmethod
    def of(cls, row: Leased) -> Self:
        """Return the resource of a row."""
        columns = {name: getattr(row, name) for name in cls.model_fields if hasattr(row, name)}
        return cls.model_validate(columns | dict(cls.derived(row)))

    @classmethod
    def derived(cls, row: Leased) -> Mapping[str, Any]:
        """Return the members that are not columns."""
        raise NotImplementedError
