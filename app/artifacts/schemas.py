"""Responses of artifacts."""

from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from app.models import Artifact


class ArtifactOut(BaseModel):
    """A file that a job produced."""

    name: str
    kind: str
    content_type: str
    size_bytes: int
    sha256: str
    details: dict[str, Any]
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, row: Artifact) -> "ArtifactOut":
        """Return the artifact of a row."""
        members = {name: getattr(row, name) for name in cls.model_fields if name != "links"}
        content = f"/v1/jobs/{row.job_id}/artifacts/{quote(row.name)}"
        return cls.model_validate({**members, "links": {"content": content}})
