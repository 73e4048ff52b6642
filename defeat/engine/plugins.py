"""Detector families, methods and dataset formats from outside this package.

A module that `DEFEAT_PLUGINS` names registers what it has when it is imported: by `defeat.engine.detectors.register`,
`defeat.engine.methods.register` or `defeat.engine.data.importing.register`.
"""

import importlib
import os
from typing import TypeVar

from defeat.engine.report import RunError

VARIABLE = "DEFEAT_PLUGINS"

Entry = TypeVar("Entry")


def load() -> None:
    """Import the modules that `DEFEAT_PLUGINS` names, separated by commas; those that are imported already stay.

    Raises:
        RunError: `plugin_unavailable` if one cannot be imported.
    """
    for name in os.environ.get(VARIABLE, "").split(","):
        if not name.strip():
            continue
        try:
            importlib.import_module(name.strip())
        except Exception as error:  # whatever the module itself raises
            raise RunError(
                "infra",
                "plugin_unavailable",
                f"{VARIABLE} names the module {name.strip()!r}, which cannot be imported "
                f"({type(error).__name__}: {error}): put it on this machine's PYTHONPATH, or take it out of {VARIABLE}",
            ) from error


def add(registry: dict[str, Entry], kind: str, name: str, entry: Entry) -> None:
    """Add an entry to a registry under its name. Raises `ValueError` if there is another one of that name."""
    if registry.get(name, entry) is not entry:
        raise ValueError(f"there is a {kind} named {name!r} already; give this one another name")
    registry[name] = entry
