"""Rules for `distillation`: combinations of methods, weights of 0, and methods that need a teacher."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from defeat.rules import Finding, Path


def combination(
    count: int, methods: Sequence[tuple[Path, str]], needs_teacher: Mapping[str, bool], path: Path
) -> Iterator[Finding]:
    """Return what is wrong with a list of methods.

    Args:
        count: length of the list.
        methods: place and name of each member that is a known method.
        needs_teacher: of every method by name, whether it needs a teacher.
        path: the list's place.
    """
    if count < 2:
        detail = f"a list combines at least two methods; got {count}: give a single one as an object, without a list"
        yield Finding(path, "bad_combination", detail)
    seen: set[str] = set()
    for place, name in methods:
        at = (*place, "method")
        if name in seen:
            yield Finding(at, "bad_combination", f"each method may stand in a combination once; {name} repeats")
        elif not needs_teacher[name]:
            yield Finding(at, "bad_combination", f"{name} teaches nothing and cannot be combined: leave it out")
        seen.add(name)


def no_weight(
    name: str, weights: Sequence[str], values: Mapping[str, Any], path: Path, *, combined: bool
) -> Iterator[Finding]:
    """Return a finding if all of a method's weights are 0; null, which stands for the authors' weight, is not.

    Args:
        name: the method's.
        weights: its parameters that are weights.
        values: its parameters by key.
        path: its place.
        combined: whether it stands in a list.
    """
    if weights and all(values[weight] == 0 for weight in weights):
        other = "leave the method out" if combined else "take the method baseline"
        yield Finding(
            path,
            "weights_all_zero",
            f"every weight is 0 ({', '.join(weights)}), so {name} would distil nothing: give one, or {other}",
        )


def no_teacher(methods: Sequence[str], needs_teacher: Mapping[str, bool]) -> Iterator[Finding]:
    """Return a finding if one of the named methods needs a teacher. For a job that has none."""
    needing = [name for name in methods if needs_teacher[name]]
    if needing:
        detail = f"method {needing[0]} needs a teacher: give `teacher`, or take a method that needs none"
        yield Finding(("teacher",), "teacher_required", detail)
