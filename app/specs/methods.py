"""The `distillation` part of a job's spec: one method or a list."""

from dataclasses import dataclass
from typing import Any

from app.request_models import Problem
from app.specs.catalog import Catalog
from app.specs.validation import Section, check_method, problem_of
from defeat.rules import Path
from defeat.rules.distillation import combination


@dataclass(frozen=True)
class Chosen:
    """A valid method with every default filled in, and its place in the body."""

    path: Path
    value: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name in the catalog."""
        return str(self.value["method"])


def check_methods(catalog: Catalog, value: object, path: Path) -> tuple[list[Chosen], list[Problem]]:
    """Check the value at `path`, an object or a list; return the methods in it that are valid, and the mistakes.

    A value of another type counts as nothing: the outer model reports it.
    """
    if isinstance(value, dict):
        return _sorted_out([(path, check_method(catalog, value, path))])
    if not isinstance(value, list):
        return [], []
    # A list longer than that repeats a method within its first members.
    first = value[: len(catalog.methods) + 1]
    sections = [
        ((*path, index), check_method(catalog, one, (*path, index), combined=True)) for index, one in enumerate(first)
    ]
    chosen, problems = _sorted_out(sections)
    needs_teacher = {name: entry["needs_teacher"] for name, entry in catalog.methods.items()}
    found = combination(len(value), [(one.path, one.name) for one in chosen], needs_teacher, path)
    return chosen, [*problems, *map(problem_of, found)]


def _sorted_out(sections: list[tuple[Path, Section]]) -> tuple[list[Chosen], list[Problem]]:
    chosen = [Chosen(path, section.value) for path, section in sections if section.value is not None]
    return chosen, [item for _, section in sections for item in section.problems]
