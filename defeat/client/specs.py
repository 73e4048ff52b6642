"""Reads specs from YAML files, with changes from the command line."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from defeat.client.errors import InvalidInput


class _Loader(yaml.SafeLoader):
    """PyYAML's YAML 1.1 with two corrections: `1e-4` is a number, and a key that occurs twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; raises `ConstructorError` for a key that occurs twice."""
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - a safe loader's subclass


def load_spec(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML (or JSON) file, with `key.path=value` changes applied.

    Values of changes are YAML too: `schedule.epochs=3` is a number, `teacher=null` is null.
    Raises `InvalidInput` for a file or a change that cannot be parsed, and for values that JSON does not have.
    """
    try:
        spec = _parse(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(f"{path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not YAML: {error}") from error
    if not isinstance(spec, dict):
        raise InvalidInput(f"{path} must be a mapping, such as `name: cells-small`")
    for change in changes:
        _change(spec, change)
    _check(spec, "")
    return spec


def _change(spec: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise InvalidInput(f"--set {change!r} must have the form key.path=value, such as schedule.epochs=3")
    target = spec
    for depth, key in enumerate(parents, start=1):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise InvalidInput(f"--set {change!r}: {'.'.join(parents[:depth])} is {target!r}, not a mapping")
    try:
        target[last] = _parse(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"--set {change!r}: the value is not YAML: {error}") from error


def _check(value: Any, where: str) -> None:
    """Raise `InvalidInput` for YAML values that JSON does not have: dates, NaN, keys that are not strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"the key {key!r} at {where or 'the top level'} is not a string; put it in quotes")
            _check(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidInput(
            f"{where} is {value!r}: a spec may only contain strings, finite numbers, true, false and null"
        )
