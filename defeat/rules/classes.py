"""Rules for class names: whether a detector knows the classes of a dataset; if not, the nearest names that it knows."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

from defeat.rules import MAX_FINDINGS, Finding, Path, show

CLASS_MAP: Path = ("teacher", "class_map")
_NEAREST = 5
_HINTS = 10


def class_map_findings(classes: Sequence[str], known: Sequence[str], class_map: Mapping[str, str]) -> Iterator[Finding]:
    """Return what keeps a teacher from a dataset.

    Every class of the dataset needs one of the teacher's, by `class_map` or by its own name, and none of the teacher's
    may stand for two: both would get the same score, by which the head would teach the student not to tell them apart
    (and under a softmax they would count twice against the background).

    Args:
        classes: the dataset's.
        known: the teacher's.
        class_map: the teacher's name of a class by the dataset's name of it.
    """
    ours, theirs = set(classes), set(known)
    wrong = [("dataset", name, name, classes) for name in class_map if name not in ours]
    wrong += [("teacher", name, mapped, known) for name, mapped in class_map.items() if mapped not in theirs]
    for index, (whose, name, sought, names) in enumerate(wrong[:MAX_FINDINGS]):
        # The nearest of thousands of names takes a while to find.
        hint = f"; {_nearest(sought, names)}" if index < _HINTS else ""
        yield Finding((*CLASS_MAP, name), "unknown_class", f"the {whose} has no class {show(sought)}{hint}")
    if unknown := [name for name in classes if name not in class_map and name not in theirs]:
        listed = ", ".join(map(repr, unknown[:20])) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        yield Finding(
            ("teacher",),
            "teacher_classes_differ",
            f"the teacher does not know {len(unknown)} of the dataset's {len(classes)} classes: {listed}; name the "
            f"teacher's class for each in class_map. For {show(unknown[0])}, {_nearest(unknown[0], known)}",
        )
    yield from _doubled(classes, class_map)


def unknown_classes(path: Path, classes: Sequence[str], known: Sequence[str]) -> Iterator[Finding]:
    """Return which classes of a dataset the checkpoint at `path` does not know; detectors are to start from it.

    Args:
        path: the initial weights' place, whose first key is `student` or `teacher`.
        classes: the dataset's.
        known: the checkpoint's.
    """
    theirs = set(known)
    if unknown := [name for name in classes if name not in theirs]:
        yield Finding(
            path,
            f"{path[0]}_classes_differ",
            f"this checkpoint does not know {len(unknown)} of the dataset's {len(classes)} classes: "
            f"{', '.join(map(show, unknown[:20]))}; of {show(unknown[0])}, {_nearest(unknown[0], known)}. Take one "
            "that knows them, or random or imagenet",
        )


def _doubled(classes: Sequence[str], class_map: Mapping[str, str]) -> Iterator[Finding]:
    served: dict[str, list[str]] = {}
    for name in classes:
        served.setdefault(class_map.get(name, name), []).append(name)
    for theirs, names in served.items():
        if len(names) > 1:
            itself = f" ({show(theirs)} maps to itself where the map does not name it)" * (theirs in names)
            yield Finding(
                (*CLASS_MAP, next(name for name in names if name in class_map)),
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
