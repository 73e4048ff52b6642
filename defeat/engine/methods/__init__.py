"""The registry of distillation methods.

A method is one file, which describes it in `METHOD`, and its name in the loop below. One from outside this package
calls `register`, see `defeat.engine.plugins`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from defeat.engine import plugins
from defeat.engine.config import require
from defeat.engine.detectors.base import Detector
from defeat.engine.methods import baseline, cwd, defeat, fgd, fgfi, fitnet, frs, mgd, pkd
from defeat.engine.methods.base import Method, StepInfo
from defeat.engine.methods.combined import Combined, MemberConfig
from defeat.engine.methods.entry import Entry, weighs
from defeat.engine.report import RunError
from defeat.rules import Path
from defeat.rules.distillation import combination, no_teacher, no_weight

__all__ = ["METHODS", "Entry", "Method", "StepInfo", "build", "register", "weighs"]

METHODS: dict[str, Entry] = {}
"""Methods by name, in the order in which they registered."""


def register(entry: Entry) -> None:
    """Add a method. Raises `ValueError` if there is another one of its name."""
    plugins.add(METHODS, "method", entry.name, entry)


for _module in (baseline, defeat, fitnet, pkd, cwd, fgd, mgd, fgfi, frs):
    register(_module.METHOD)


def build(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]], student: Detector, teacher: Detector | None) -> Method:
    """Build what `spec` describes for this student and teacher.

    Args:
        spec: `{"method": …, …parameters}`, or a list of at least two of these, each with a `weight` as well.
        student: the detector that is trained.
        teacher: the detector that it learns from; None where no method needs one.

    Raises:
        RunError: unknown method, unknown keys, values out of range, `weights_all_zero`, `teacher_required`, detectors
            that the method cannot pair; for a list also `bad_combination`.
    """
    path: Path = ("distillation",)
    needs_teacher = {name: entry.needs_teacher for name, entry in METHODS.items()}
    if isinstance(spec, Mapping):
        return _build(spec, student, teacher, path, combined=False)
    known = [((*path, index), one["method"]) for index, one in enumerate(spec) if one.get("method") in METHODS]
    require(combination(len(spec), known, needs_teacher, path))
    return Combined(list(_members(spec, student, teacher, path)))


def _members(
    specs: Sequence[Mapping[str, Any]], student: Detector, teacher: Detector | None, path: Path
) -> Iterator[tuple[str, float, Method]]:
    for index, one in enumerate(specs):
        given = {key: value for key, value in one.items() if key in MemberConfig.model_fields}
        own = {key: value for key, value in one.items() if key not in given}
        weight = MemberConfig.parse(given, where=f"distillation.{index}").weight
        method = _build(own, student, teacher, (*path, index), combined=True)
        yield str(one["method"]), weight, method


def _build(
    spec: Mapping[str, Any], student: Detector, teacher: Detector | None, path: Path, *, combined: bool
) -> Method:
    name, where = spec.get("method"), ".".join(map(str, path))
    if name not in METHODS:
        raise RunError("user", "unknown_method", f"{where}.method is {name!r}; known: {', '.join(METHODS)}")
    entry = METHODS[name]
    config = entry.config.parse(spec, where=where)
    require(no_weight(name, entry.weights, dict(config), path, combined=combined))
    if teacher is None:
        require(no_teacher([name], {name: entry.needs_teacher}))
    return entry.build(config, student, teacher)
