"""The `distillation` part of a job's spec: one method or a list, and whether the detectors have what each matches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.bodies import Problem, pointer, problem
from app.catalog import Catalog
from app.validation import Path, Section, check_method


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


def part_problems(
    catalog: Catalog, method: Chosen, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> Iterator[Problem]:
    """Tell which parts the method matches that the two detectors do not have. See `Entry` in `worker.methods`."""
    entry = catalog.methods[method.name]
    families = {
        "student": catalog.detectors[student["architecture"]],
        "teacher": catalog.detectors[teacher["architecture"]],
    }
    for need in entry["needs"]:
        who, _, part = need.partition(".")
        if part and part not in families[who]["provides"]:
            able = ", ".join(name for name, family in catalog.detectors.items() if part in family["provides"])
            detail = f"{method.name} needs a {who} with {part}, which this family has not; those that have: {able}"
            yield problem(pointer((*method.path, "method")), f"{part}_missing", detail)
    yield from _weight_problems(
        method,
        entry["backbone_weights"],
        lambda: all("backbone" in family["provides"] for family in families.values()),
        "backbones_do_not_pair",
        "compares the maps of both backbones, and not both of these families hand them out",
    )
    yield from _weight_problems(
        method,
        entry["logit_weights"],
        lambda: (
            families["student"]["head"] == families["teacher"]["head"] and "logits" in families["student"]["provides"]
        ),
        "logits_do_not_pair",
        "compares what both dense heads score in a cell, and these two are not of one kind",
    )


def _weight_problems(
    method: Chosen, keys: Iterable[str], fits: Callable[[], bool], code: str, reason: str
) -> Iterator[Problem]:
    for key in keys:
        weight = method.value[key]
        if (weight is None or weight > 0) and not fits():  # null: the authors' own weight
            yield problem(pointer((*method.path, key)), code, f"{key} {reason}: set it to 0")
