"""Whether a teacher fits a student and a dataset, and where it does not, the nearest change that would make it fit."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from app.bodies import MAX_ERRORS, Problem, pointer, problem, show
from app.catalog import Catalog
from app.validation import Path, check_detector

CLASS_MAP: Path = ("teacher", "class_map")

# What levels above the backbone's add to a pyramid, as multiples of its coarsest stride: see `worker.detectors`.
_EXTRA_LEVELS: dict[tuple[str, object], tuple[int, ...]] = {
    ("extra_levels", "p6p7"): (2, 4),
    ("extra_levels", "p6p7_backbone"): (2, 4),
    ("extra_levels", "pool"): (2,),
    ("pool_level", True): (2,),
}
_NEAREST = 5
_HINTS = 10


def strides_of(detector: Mapping[str, Any]) -> list[int]:
    """Return the strides of a detector spec's pyramid in pixels, finest first, extra levels too; empty if unknown."""
    strides: list[int] = list(detector.get("strides", ()))
    factors = [
        factor
        for (key, value), added in _EXTRA_LEVELS.items()
        if strides and detector.get(key) == value
        for factor in added
    ]
    return [*strides, *(factor * strides[-1] for factor in factors)]


def strides_apart(
    catalog: Catalog, student: dict[str, Any], teacher: dict[str, Any], *, teacher_is_free: bool
) -> str | None:
    """Return why no level of the two pyramids pairs and what would, or None where one does or that is not known.

    Args:
        catalog: which detectors there are.
        student: its detector spec, complete.
        teacher: likewise.
        teacher_is_free: whether its detector may still be changed, since it is trained in the job.
    """
    ours, theirs = strides_of(student), strides_of(teacher)
    if not ours or not theirs or set(ours) & set(theirs):
        return None
    remedy = _remedy(catalog, "strides", student, teacher, teacher_is_free=teacher_is_free)
    return (
        f"the student's pyramid has strides {ours}, the teacher's {theirs}: none in common, and levels must pair; "
        + (remedy or "take a student and a teacher that share one, or a method that leaves the pyramid alone")
    )


def channels_apart(
    catalog: Catalog, student: dict[str, Any], teacher: dict[str, Any], *, teacher_is_free: bool
) -> str | None:
    """Return why the two pyramids' channels differ and what would do, or None where they are equal or not known.

    The arguments are those of `strides_apart`.
    """
    ours, theirs = student.get("pyramid_channels"), teacher.get("pyramid_channels")
    if ours is None or theirs is None or ours == theirs:
        return None
    remedy = _remedy(catalog, "pyramid_channels", student, teacher, teacher_is_free=teacher_is_free)
    others = [name for name, entry in catalog.methods.items() if entry["needs"] == ["neck"]]
    choices = [remedy] if remedy else []
    if others:
        choices.append(f"take a method that adapts them: {', '.join(others)}")
    return (
        f"the student's pyramid has {ours} channels, the teacher's {theirs}, and this method compares them one by one: "
        + ", or ".join(choices)
    )


def _remedy(
    catalog: Catalog, key: str, student: dict[str, Any], teacher: dict[str, Any], *, teacher_is_free: bool
) -> str | None:
    """Return the change of one detector's `key` to what the other has that its family takes; the student's first."""
    changes = [("student", student, teacher[key])]
    if teacher_is_free:
        changes.append(("teacher", teacher, student[key]))
    for whose, detector, value in changes:
        if not check_detector(catalog, detector | {key: value}, ()).problems:
            return f"give the {whose} {key} {value}"
    return None


def heads_apart(catalog: Catalog, key: str, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> str | None:
    """Return why the method's weight `key`, which compares proposals, must be 0; None if both heads have proposals."""
    without = {
        f"the {whose} ({detector['architecture']})": whose
        for whose, detector in (("student", student), ("teacher", teacher))
        if catalog.detectors[detector["architecture"]]["head"] != "two_stage"
    }
    if not without:
        return None
    two_stage = [name for name, family in catalog.detectors.items() if family["head"] == "two_stage"]
    verb = "is a one-stage detector and has" if len(without) == 1 else "are one-stage detectors and have"
    return (
        f"{key} compares proposals, and {' and '.join(without)} {verb} none: set it to 0, or take a two-stage "
        f"{' and '.join(without.values())} ({', '.join(two_stage)})"
    )


def class_problems(classes: Sequence[str], known: Sequence[str], class_map: Mapping[str, str]) -> Iterator[Problem]:
    """Tell what keeps a teacher that knows the classes `known` from a dataset with these `classes`.

    Every class of the dataset needs one of the teacher's, by `class_map` or by its own name, and none of them may stand
    for two: both would get the same score, by which the head would teach the student not to tell them apart (and under
    a softmax they would count twice against the background).
    """
    ours, theirs = set(classes), set(known)
    wrong = [("dataset", name, name, classes) for name in class_map if name not in ours]
    wrong += [("teacher", name, mapped, known) for name, mapped in class_map.items() if mapped not in theirs]
    for index, (whose, name, sought, names) in enumerate(wrong[:MAX_ERRORS]):
        # The nearest of thousands of names takes a while to find.
        hint = f"; {_nearest(sought, names)}" if index < _HINTS else ""
        yield problem(pointer((*CLASS_MAP, name)), "unknown_class", f"the {whose} has no class {show(sought)}{hint}")
    if unknown := [name for name in classes if name not in class_map and name not in theirs]:
        listed = ", ".join(map(repr, unknown[:20])) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        yield problem(
            pointer(("teacher",)),
            "teacher_classes_differ",
            f"the teacher does not know {len(unknown)} of the dataset's {len(classes)} classes: {listed}; say in "
            f"class_map which of its classes they are. For {show(unknown[0])}, {_nearest(unknown[0], known)}",
        )
    yield from _doubled(classes, class_map)


def _doubled(classes: Sequence[str], class_map: Mapping[str, str]) -> Iterator[Problem]:
    served: dict[str, list[str]] = {}
    for name in classes:
        served.setdefault(class_map.get(name, name), []).append(name)
    for theirs, names in served.items():
        if len(names) > 1:
            itself = f" ({show(theirs)} maps to itself where the map does not say otherwise)" * (theirs in names)
            yield problem(
                pointer((*CLASS_MAP, next(name for name in names if name in class_map))),
                "class_map_not_one_to_one",
                f"the teacher's class {show(theirs)} would stand for {', '.join(map(show, names[:20]))}{itself}: it "
                "cannot tell them apart, and would teach the student not to; give each a class of its own, or merge "
                "them in the dataset",
            )


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=_NEAREST)
    if near:
        return f"nearest: {', '.join(map(show, near))}"
    first = ", ".join(map(show, islice(names, _NEAREST)))
    return f"it has: {first}" + (f" and {len(names) - _NEAREST} more" if len(names) > _NEAREST else "")
