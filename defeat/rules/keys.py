"""How the value of one key bounds another's: what JSON Schema cannot express, published as a schema's `x-rules`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NotRequired, TypedDict

from defeat.rules import Finding, Path, show


class Rule(TypedDict):
    """One rule of a config.

    `below` and `at_most` compare a number, or each number of a list, with the other key's number. `divides` requires
    the other key's number to be a multiple. `only_with` requires the other key to have `value` unless this is empty.
    """

    key: str
    rule: Literal["below", "at_most", "divides", "only_with"]
    other: str
    value: NotRequired[str]


def broken_rules(rules: Iterable[Rule], values: Mapping[str, Any], path: Path = ()) -> Iterator[Finding]:
    """Return which of a config's rules its values break; `values` has every key, `path` is the config's place."""
    for rule in rules:
        key, other = rule["key"], rule["other"]
        given, bound = values[key], values[other]
        numbers = list(given) if isinstance(given, (list, tuple)) else [given]
        shown = show(numbers if isinstance(given, tuple) else given)
        problem = None
        if rule["rule"] == "below" and any(number >= bound for number in numbers):
            problem = f"it must be below {other}, which is {bound}"
        elif rule["rule"] == "at_most" and any(number > bound for number in numbers):
            problem = f"it must be at most {other}, which is {bound}"
        elif rule["rule"] == "divides" and bound % given:
            problem = f"it must divide {other}, which is {bound}"
        elif rule["rule"] == "only_with" and given and bound != rule["value"]:
            problem = f"it belongs to {other}: {rule['value']}, and {other} is {bound}"
        if problem:
            yield Finding((*path, key), "out_of_range", f"{problem}; got {shown}")
