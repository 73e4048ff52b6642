"""For a pair of detectors that does not fit: the nearest pair that would."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from app.specs.catalog import Catalog
from app.specs.levels import strides_of
from app.specs.validation import check_detector
from defeat.rules import show

Detector = dict[str, Any]
Fits = Callable[[Detector, Detector], bool]


def nearest(
    catalog: Catalog,
    keys: Sequence[str],
    student: Detector,
    teacher: Detector,
    *,
    teacher_is_free: bool,
    fits: Fits,
) -> str | None:
    """Return the change of one of two detectors by which they would fit, or None if none is found.

    The change of the fewest keys, the student's before the teacher's; then the one by which most levels pair and fewest
    do not. If a detector's own family has none, a change to another family.

    Args:
        catalog: which detectors there are.
        keys: keys of a detector's spec that may be changed.
        student: its spec, complete.
        teacher: likewise.
        teacher_is_free: whether the teacher may be changed.
        fits: returns whether a student and a teacher fit.
    """
    sides: list[tuple[str, Detector, Detector]] = [("student", student, teacher)]
    if teacher_is_free:
        sides.append(("teacher", teacher, student))
    for count in range(1, len(keys) + 1):
        for whose, mine, other in sides:
            if change := _best(catalog, keys, whose, mine, other, count=count, fits=fits):
                return "set " + " and ".join(
                    f"{whose}.detector.{key} to {show(value)}" for key, value in change.items()
                )
    for count in range(len(keys) + 1):
        for whose, mine, other in sides:
            for family in catalog.detectors:
                if family == mine["architecture"]:
                    continue
                base = _default(catalog, family, mine.get("backbone"))
                change = _best(catalog, keys, whose, base, other, count=count, fits=fits)
                if change is not None:
                    values = " and ".join(f"{key} {show(value)}" for key, value in change.items())
                    return f"take a {whose} of {family}" + f" with {values}" * bool(change)
    return None


def _best(
    catalog: Catalog,
    keys: Sequence[str],
    whose: str,
    mine: Detector,
    other: Detector,
    *,
    count: int,
    fits: Fits,
) -> Detector | None:
    """Return the best change of exactly `count` of the keys that the family has, or None."""
    found = []
    for change in _changes(catalog, keys, mine, other, count=count):
        changed = mine | change
        if fits(changed, other) if whose == "student" else fits(other, changed):
            ours, theirs = set(strides_of(catalog, changed)), set(strides_of(catalog, other))
            found.append((-len(ours & theirs), len(ours ^ theirs), change))
    for *_, change in sorted(found, key=lambda one: one[:2]):
        if not check_detector(catalog, mine | change, ()).problems:
            return change
    return None


def _changes(
    catalog: Catalog, keys: Sequence[str], mine: Detector, other: Detector, *, count: int
) -> Iterator[dict[str, Any]]:
    members = catalog.fields(mine)
    values = {
        key: [value for value in _values(members[key], key, other) if value != mine[key]]
        for key in keys
        if key in members
    }
    for chosen in combinations(values, count):
        for given in product(*(values[key] for key in chosen)):
            yield dict(zip(chosen, given, strict=True))


def _values(member: Mapping[str, Any], key: str, other: Detector) -> list[Any]:
    """Return values for a key: all that it takes, or if these are endless the other detector's."""
    if "enum" in member:
        return list(member["enum"])
    if member.get("type") == "boolean":
        return [False, True]
    return [other[key]] if key in other else []


def _default(catalog: Catalog, family: str, backbone: str | None) -> Detector:
    """Return the family's default spec, on this backbone where it takes it."""
    backbones = catalog.detectors[family]["schema"]["properties"]["backbone"]
    spec: Detector = {"architecture": family}
    if "backbone" in catalog.detectors[family]["schema"].get("required", ()):
        spec["backbone"] = backbone if backbone in backbones["enum"] else backbones["enum"][0]
    value = check_detector(catalog, spec, ()).value
    assert value is not None
    return value
