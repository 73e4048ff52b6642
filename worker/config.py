"""What every engine config is: frozen, keyword-only, refusing unknown keys, and writing its own JSON Schema."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from worker.report import RunError


class Config(BaseModel):
    """Base of all configs. Each field states its unit and range; `python -m worker.catalog` publishes the schemas."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    @classmethod
    def parse(cls, spec: Mapping[str, Any], *, where: str) -> Self:
        """Return the config that `spec` describes; `where` names its place in the job spec for the error.

        Raises `RunError("user", "bad_spec", …)` naming each wrong key and value.
        """
        try:
            return cls.model_validate(dict(spec))
        except ValidationError as error:
            mistakes = "; ".join(
                f"{where}.{'.'.join(str(part) for part in mistake['loc'])}: {mistake['msg']} (got {mistake['input']!r})"
                for mistake in error.errors()
            )
            raise RunError("user", "bad_spec", mistakes[:2000]) from error
