"""The `distillation` part of a job's spec: one method or a list."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from app.request_models import Problem, pointer, problem
from app.specs.catalog import Catalog
from app.specs.validation import Path, Section, check_method


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
    """Check what stands at `path`, an object or a list; return what is valid of it, and the mistakes.

    A value of another type counts as nothing: the outer model has said so.
    """
    if isinstance(value, dict):
        return _sorted_out([(path, check_method(catalog, value, path))])
    if not isinstance(value, list):
        return [], []
    # One more than there are methods repeats one of them: what comes after need not be looked at.
    first = value[: len(catalog.methods) + 1]
    sections = [
        ((*path, index), check_method(catalog, one, (*path, index), combined=True)) for index, one in enumerate(first)
    ]
    chosen, problems = _sorted_out(sections)
    return chosen, [*problems, *_combination_problems(catalog, len(value), chosen, path)]


def _sorted_out(sections: list[tuple[Path, Section]]) -> tuple[list[Chosen], list[Problem]]:
    chosen = [Chosen(path, section.value) for path, section in sections if section.value is not None]
    return chosen, [item for _, section in sections for item in section.problems]


def _combination_problems(catalog: Catalog, count: int, chosen: list[Chosen], path: Path) -> Iterator[Problem]:
    if count < 2:
        detail = f"a list combines at least two methods; got {count}: give a single one as an object, without a list"
        yield problem(pointer(path), "bad_combination", detail)
    seen: set[str] = set()
    for method in chosen:
        at = pointer((*method.path, "method"))
        if method.name in seen:
            yield problem(at, "bad_combination", f"each method may stand in a combination once; {method.name} repeats")
        elif not catalog.methods[method.name]["needs_teacher"]:
            yield problem(at, "bad_combination", f"{method.name} teaches nothing and cannot be combined: leave it out")
        seen.add(method.name)
