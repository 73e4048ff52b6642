"""Checks specs against the catalog's JSON Schemas: every mistake reported, every default filled in."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from app.request_models import MAX_ERRORS, Problem, pointer, problem
from app.specs.catalog import Catalog
from defeat.rules import Finding, Path, show
from defeat.rules.distillation import no_weight
from defeat.rules.keys import broken_rules

# A wrong value of these has a code of its own: each is a name from a long list.
_NAMED_CHOICES = frozenset({"architecture", "backbone", "weights", "method", "detector"})
FORM_CODES = frozenset(
    {
        "bad_json",
        "missing_key",
        "out_of_range",
        "unfit_value",
        "unknown_choice",
        "unknown_key",
        "wrong_format",
        "wrong_type",
        *(f"unknown_{key}" for key in _NAMED_CHOICES),
    }
)
"""Codes of mistakes in the form of a single value. All others are rules of a job: one that is broken alone gives the
whole answer its code."""
_SHORT_LIST = 12
_NEAREST = 10


def problem_of(finding: Finding) -> Problem:
    """Return the entry of a problem document's `errors` for a rule's finding."""
    return problem(pointer(finding.path), finding.code, finding.detail)


def unknown_choice(path: Path, value: object, choices: Collection[object]) -> Problem:
    """Return the error for a value that is none of `choices`: all of them, or the nearest ten of a long list."""
    key = str(path[-1]) if path else "value"
    code = f"unknown_{key}" if key in _NAMED_CHOICES else "unknown_choice"
    names = [choice if isinstance(choice, str) else show(choice) for choice in choices]
    if len(names) <= _SHORT_LIST:
        known = f"known: {', '.join(names)}"
    else:
        nearest = difflib.get_close_matches(str(value), names, n=_NEAREST, cutoff=0.0)
        known = f"nearest: {', '.join(nearest)}; all {len(names)} are listed by GET /v1/catalog"
    return problem(pointer(path), code, f"unknown {key} {show(value)}; {known}")


def check(schema: Mapping[str, Any], value: object, path: Path) -> list[Problem]:
    """Return the mistakes in `value`, whose place in the body is `path`; empty if it is valid.

    All of them, unless there are more than `MAX_ERRORS`: then a few more than that.
    """
    first = islice(Draft202012Validator(schema).iter_errors(value), MAX_ERRORS + 1)
    errors = sorted(first, key=lambda error: list(map(str, error.path)))
    found = [item for error in errors for item in _explain(error, path)]
    mistyped = {item["pointer"] for item in found if item["code"] == "wrong_type"}
    # Other mistakes of a value of the wrong type follow from its type.
    return [item for item in found if item["code"] == "wrong_type" or item["pointer"] not in mistyped]


def _explain(error: ValidationError, path: Path) -> Iterator[Problem]:
    at = (*path, *error.absolute_path)
    kind = str(error.validator)
    value: Any = error.instance
    limit: Any = error.validator_value
    schema: Any = error.schema
    if kind == "additionalProperties":
        known = sorted(schema.get("properties", {}))
        for key in sorted(set(value) - set(known))[: MAX_ERRORS + 1]:
            yield problem(pointer((*at, key)), "unknown_key", f"unknown key; known keys: {', '.join(known)}")
    elif kind == "required":
        # jsonschema gives one error for each missing key, and names it in the message alone.
        missing = next(key for key in limit if error.message.startswith(f"{key!r} "))
        yield problem(pointer((*at, missing)), "missing_key", _describe(schema, missing))
    elif kind in ("enum", "const"):
        yield unknown_choice(at, value, limit if kind == "enum" else [limit])
    elif kind == "type":
        wanted = " or ".join(limit) if isinstance(limit, list) else limit
        yield problem(pointer(at), "wrong_type", f"it must be of type {wanted}; got {show(value)}")
    elif kind in ("anyOf", "oneOf"):
        yield from _explain_branches(error, path)
    else:
        yield problem(pointer(at), "out_of_range", f"{_RULES.get(kind, kind + ' {}').format(limit)}; got {show(value)}")


_RULES = {
    "minimum": "it must be at least {}",
    "maximum": "it must be at most {}",
    "exclusiveMinimum": "it must be greater than {}",
    "exclusiveMaximum": "it must be less than {}",
    "multipleOf": "it must be a multiple of {}",
    "minItems": "it must have at least {} items",
    "maxItems": "it must have at most {} items",
    "uniqueItems": "its items must differ from each other",
    "minLength": "it must have at least {} characters",
    "maxLength": "it must have at most {} characters",
    "pattern": "it must match {}",
}


def _describe(schema: Mapping[str, Any], key: str) -> str:
    description = schema.get("properties", {}).get(key, {}).get("description")
    return f"this key is required: {description}" if description else "this key is required"


def _explain_branches(error: ValidationError, path: Path) -> Iterator[Problem]:
    """Explain why no branch of an `anyOf` fits, by the branch whose type does fit if there is one."""
    branches: dict[object, list[ValidationError]] = {}
    for inner in error.context or []:
        branches.setdefault(inner.schema_path[0], []).append(inner)
    fitting = [group for group in branches.values() if not any(_is_own_type(inner) for inner in group)]
    if fitting:
        for inner in min(fitting, key=len):
            yield from _explain(inner, path)
        return
    wanted = " or ".join(str(inner.validator_value) for group in branches.values() for inner in group)
    at = pointer((*path, *error.absolute_path))
    yield problem(at, "wrong_type", f"it must be of type {wanted}; got {show(error.instance)}")


def _is_own_type(error: ValidationError) -> bool:
    return error.validator == "type" and not error.relative_path


def complete(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any] | None = None) -> Any:
    """Return a valid `value` with every default filled in, and whole numbers as integers for integer fields."""
    root = root if root is not None else schema
    schema = _resolve(schema, root)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        given = {key: member["default"] for key, member in properties.items() if "default" in member} | value
        return {key: complete(properties.get(key, {}), member, root) for key, member in given.items()}
    if isinstance(value, list):
        return [complete(schema.get("items", {}), item, root) for item in value]
    if isinstance(value, float) and schema.get("type") == "integer":
        return int(value)
    return value


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    return schema


class Section:
    """A part of a spec, checked: `value` is complete, or None where there are `problems`."""

    def __init__(self, value: dict[str, Any] | None, problems: Iterable[Problem] = ()) -> None:
        self.value = value
        self.problems = list(problems)


def check_section(schema: Mapping[str, Any], value: object, path: Path) -> Section:
    """Check one object against its schema and fill in its defaults."""
    problems = check(schema, value, path)
    if problems:
        return Section(None, problems)
    whole = complete(schema, value)
    problems = [problem_of(finding) for finding in broken_rules(schema.get("x-rules", ()), whole, path)]
    return Section(None, problems) if problems else Section(whole)


def _check_chosen(
    entries: Mapping[str, Any], key: str, value: object, path: Path, *, also: Mapping[str, Any] | None = None
) -> Section:
    """Check an object whose schema depends on `value[key]`; `also`: the schema of further keys that it may have."""
    if not isinstance(value, dict):
        return Section(None, [problem(pointer(path), "wrong_type", f"it must be an object; got {show(value)}")])
    if key not in value:
        known = ", ".join(entries)
        return Section(None, [problem(pointer((*path, key)), "missing_key", f"this key is required; known: {known}")])
    chosen = value[key]
    if not isinstance(chosen, str) or chosen not in entries:
        return Section(None, [unknown_choice((*path, key), chosen, list(entries))])
    schema = entries[chosen]["schema"]
    if also:
        schema = schema | {"properties": schema["properties"] | also["properties"]}
    return check_section(schema, value, path)


def check_detector(catalog: Catalog, value: object, path: Path) -> Section:
    """Check a detector spec: `architecture` picks the schema."""
    return _check_chosen(catalog.detectors, "architecture", value, path)


def check_method(catalog: Catalog, value: object, path: Path, *, combined: bool = False) -> Section:
    """Check a method's spec: `method` picks the schema; one that is combined with others also has a `weight`."""
    also = catalog.schema("combination") if combined else None
    section = _check_chosen(catalog.methods, "method", value, path, also=also)
    if section.value is None:
        return section
    name = section.value["method"]
    weights = catalog.methods[name]["weights"]
    problems = [problem_of(finding) for finding in no_weight(name, weights, section.value, path, combined=combined)]
    return Section(None, problems) if problems else section
