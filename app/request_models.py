"""Strict request models, whose errors name the key, the value and the remedy."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, ValidationError

from app.errors import Invalid
from defeat.rules import MAX_FINDINGS, show

MAX_DEPTH = 32
MAX_ERRORS = MAX_FINDINGS
"""How many errors one answer lists: a body of a megabyte can have hundreds of thousands."""

Problem = dict[str, str]

_CODES = {
    "missing": "missing_key",
    "union_tag_not_found": "missing_key",
    "extra_forbidden": "unknown_key",
    "union_tag_invalid": "unknown_choice",
    "literal_error": "unknown_choice",
    "enum": "unknown_choice",
    "json_invalid": "bad_json",
    "greater_than": "out_of_range",
    "greater_than_equal": "out_of_range",
    "less_than": "out_of_range",
    "less_than_equal": "out_of_range",
    "finite_number": "out_of_range",
    "string_too_short": "out_of_range",
    "string_too_long": "out_of_range",
    "too_short": "out_of_range",
    "too_long": "out_of_range",
    "string_pattern_mismatch": "wrong_format",
}


def problem(pointer: str, code: str, detail: str) -> Problem:
    """Return one entry of a problem document's `errors`."""
    return {"pointer": pointer, "code": code, "detail": detail}


def pointer(tokens: Iterable[object]) -> str:
    """Return the JSON pointer (RFC 6901) of a path of keys and indices, with unprintable characters escaped."""
    escaped = (str(token).replace("~", "~0").replace("/", "~1")[:100] for token in tokens)
    return "".join(f"/{token}" for token in escaped).encode("utf-8", "backslashreplace").decode()


def invalid(errors: list[Problem], *, code: str | None = None) -> Invalid:
    """Return the exception for these errors. Its detail holds the first one; at most `MAX_ERRORS` are listed."""
    first = errors[0]
    text = f"{first['pointer']}: {first['detail']}" if first["pointer"] else first["detail"]
    count = str(len(errors)) if len(errors) <= MAX_ERRORS else f"more than {MAX_ERRORS}"
    detail = text if len(errors) == 1 else f"the request has {count} errors; the first: {text}"
    return Invalid(detail, code=code, errors=errors[:MAX_ERRORS])


def explain(item: Mapping[str, Any], *, known: Iterable[str] = ()) -> tuple[str, str]:
    """Return (code, detail) of one of pydantic's errors; `known` are the keys that the object may have."""
    kind, given = item["type"], item.get("input")
    context = item.get("ctx", {})
    if kind == "missing":
        return "missing_key", "this key is required"
    if kind == "union_tag_not_found":
        return "missing_key", f"the key {context['discriminator']} is required"
    if kind == "union_tag_invalid":
        return (
            "unknown_choice",
            f"unknown {context['discriminator']} {show(context['tag'])}; known: {context['expected_tags']}",
        )
    if kind == "extra_forbidden":
        return "unknown_key", f"unknown key; known keys: {', '.join(sorted(known))}"
    if kind == "json_invalid":
        return "bad_json", f"the body is not JSON: {context.get('error')} at character {item['loc'][-1]}"
    if isinstance(given, bytes):
        return "wrong_type", "send the body as JSON, with Content-Type: application/json"
    if isinstance(given, (dict, list)):
        return _CODES.get(kind, "wrong_type"), str(item["msg"])
    return _CODES.get(kind, kind if kind not in _BUILTIN_TYPES else "wrong_type"), f"{item['msg']}; got {show(given)}"


_BUILTIN_TYPES = frozenset(
    f"{name}_{suffix}"
    for name in ("string", "int", "float", "bool", "dict", "list", "model", "model_attributes")
    for suffix in ("type", "parsing", "from_float", "unicode", "parsing_size")
)


def unfit(value: object) -> list[tuple[tuple[object, ...], str]]:
    """Return (path, reason) for values that JSON parsers accept, but JSON or the database cannot represent.

    These are NaN, infinity, NUL, lone surrogates, and nesting deeper than `MAX_DEPTH`. The search ends after more than
    `MAX_ERRORS`.
    """
    found: list[tuple[tuple[object, ...], str]] = []
    todo: list[tuple[tuple[object, ...], object]] = [((), value)]
    while todo and len(found) <= MAX_ERRORS:
        path, item = todo.pop()
        if isinstance(item, str) and not _storable(item):
            found.append((path, f"text must not contain NUL or lone surrogates; got {show(item)}"))
        elif isinstance(item, float) and not math.isfinite(item):
            found.append((path, f"a number must be finite; got {item}"))
        elif isinstance(item, (dict, list)) and len(path) >= MAX_DEPTH:
            found.append((path, f"nested deeper than {MAX_DEPTH} levels"))
        elif isinstance(item, dict):
            found.extend(
                (path, f"the key {show(key)} contains NUL or a lone surrogate")
                for key in item
                if not _storable(str(key))
            )
            todo.extend(((*path, key), member) for key, member in item.items() if _storable(str(key)))
        elif isinstance(item, list):
            todo.extend(((*path, index), member) for index, member in enumerate(item))
    return found


def _storable(text: str) -> bool:
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


class Body(BaseModel):
    """A request body or a part of one. Unknown keys are errors, and every error names the remedy."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        unfits = unfit(value)
        if unfits:
            lines = [
                InitErrorDetails(type=_custom("unfit_value", reason), loc=_location(path), input=None)
                for path, reason in unfits
            ]
            raise ValidationError.from_exception_data(cls.__name__, lines)
        try:
            return handler(value)
        except ValidationError as error:
            lines = [cls._line(item) for item in error.errors(include_url=False)[: MAX_ERRORS + 1]]
            raise ValidationError.from_exception_data(cls.__name__, lines) from None

    @classmethod
    def _line(cls, item: ErrorDetails) -> InitErrorDetails:
        code, detail = item["type"], item["msg"]
        # A nested body has explained its errors already: their codes are not pydantic's.
        if code in _CODES or code in _BUILTIN_TYPES:
            code, detail = explain(item, known=cls.model_fields)
        location = item["loc"]
        field = cls.model_fields.get(str(location[0])) if location else None
        if field is not None and field.discriminator is not None and len(location) > 1:
            # pydantic puts the variant's tag into the path; the body has no such key.
            location = (location[0], *location[2:])
        return InitErrorDetails(type=_custom(code, detail), loc=location, input=item["input"])


def _custom(code: str, detail: str) -> PydanticCustomError:
    # The text is passed as a value: in a template, its braces would be read as placeholders.
    return PydanticCustomError(code, "{detail}", {"detail": detail})


def _location(path: tuple[object, ...]) -> tuple[int | str, ...]:
    return tuple(token if isinstance(token, int) else str(token) for token in path)


def problems_of(error: ValidationError) -> list[Problem]:
    """Return the `errors` entries of a failed `Body`."""
    return [problem(pointer(item["loc"]), item["type"], item["msg"]) for item in error.errors(include_url=False)]


def _printable(text: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise PydanticCustomError("wrong_format", "control characters are not allowed")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("wrong_format", "it must not be blank")
    return text


Line = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
"""A line of text: at most 200 characters, no control characters."""
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable), AfterValidator(_not_blank)]
"""A name: 1 to 200 printable characters, not blank."""
