"""Base of every engine config: frozen, strict about keys, and with a JSON Schema that the service checks specs by."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator
from pydantic_core import ErrorDetails

from defeat.engine.report import RunError
from defeat.rules import Finding
from defeat.rules.keys import Rule, broken_rules


def with_rules(*rules: Rule) -> ConfigDict:
    """Return the model config that publishes these rules as `x-rules`; `Config` enforces them."""
    listed: list[JsonValue] = [{name: str(value) for name, value in rule.items()} for rule in rules]
    return ConfigDict(json_schema_extra={"x-rules": listed})


class Config(BaseModel):
    """Base of all configs. Each field states its unit and range; `defeat.engine.catalog` publishes the schemas."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        extra: Any = type(self).model_config.get("json_schema_extra")
        if extra and (found := list(broken_rules(extra.get("x-rules", ()), dict(self)))):
            raise ValueError("; ".join(f"{finding.path[-1]}: {finding.detail}" for finding in found))
        return self

    @classmethod
    def parse(cls, spec: Mapping[str, Any], *, where: str) -> Self:
        """Return the config that `spec` describes; `where` names its place in the job spec for the error.

        Raises `RunError("user", "bad_spec", …)` naming each wrong key and value.
        """
        try:
            return cls.model_validate(dict(spec))
        except ValidationError as error:
            mistakes = "; ".join(_mistake(spec, where, mistake) for mistake in error.errors())
            raise RunError("user", "bad_spec", mistakes[:2000]) from error


def _mistake(spec: Mapping[str, Any], where: str, mistake: ErrorDetails) -> str:
    """Return one line about a wrong value: its place, what is wrong, and the value unless that is an object."""
    place: list[object] = [where]
    value: Any = spec
    *parents, last = mistake["loc"] or ("",)
    for key in parents:
        # The tag of a union's member is in pydantic's path as well, and not in the spec.
        if not isinstance(value, Mapping) or key in value:
            place.append(key)
            value = value[key]
    got = "" if isinstance(mistake["input"], Mapping) else f" (got {mistake['input']!r})"
    return f"{'.'.join(str(part) for part in (*place, last) if part != '')}: {mistake['msg']}{got}"


def require(findings: Iterable[Finding]) -> None:
    """Raise the first finding, if there is one, as a `RunError` of class "user"."""
    for finding in findings:
        place = ".".join(map(str, finding.path))
        raise RunError("user", finding.code, f"{place}: {finding.detail}"[:2000])
