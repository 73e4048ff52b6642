"""What every engine config is: frozen, keyword-only, refusing unknown keys, and writing its own JSON Schema."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, Self, TypedDict

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from defeat.engine.report import RunError


class Rule(TypedDict):
    """How the value of one key bounds another's: a schema's `x-rules`, which the API checks when a job is sent.

    `below` and `at_most` compare a number, or each number of a list, with the other key's number; `divides` wants the
    other key's number to be a multiple; `only_with` wants the other key to have `value` unless this one is empty. The
    config's own validator says the same.
    """

    key: str
    rule: Literal["below", "at_most", "divides", "only_with"]
    other: str
    value: NotRequired[str]


def with_rules(*rules: Rule) -> ConfigDict:
    """Return the model config that publishes these rules."""
    listed: list[JsonValue] = [{name: str(value) for name, value in rule.items()} for rule in rules]
    return ConfigDict(json_schema_extra={"x-rules": listed})


class Config(BaseModel):
    """Base of all configs. Each field states its unit and range; `defeat.engine.catalog` publishes the schemas."""

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
