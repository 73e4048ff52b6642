"""Whether the methods can compare a teacher and a student; if not, which change would make them fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.request_models import Problem, pointer, problem
from app.specs.catalog import Catalog
from app.specs.levels import backbone_strides_of, levels_of, pairs_of, strides_of
from app.specs.methods import Chosen
from app.specs.nearest import Fits, nearest
from defeat.rules import Path


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """Why a method cannot match two detectors.

    Attributes:
        keys: the keys of a detector's spec that decide it; empty if its family does.
        otherwise: a remedy other than a change of these.
    """

    path: Path
    code: str
    reason: str
    keys: tuple[str, ...] = ()
    otherwise: str | None = None


def pair_problems(
    catalog: Catalog,
    methods: Sequence[Chosen],
    student: dict[str, Any],
    teacher: dict[str, Any],
    *,
    teacher_is_free: bool,
) -> Iterator[Problem]:
    """Return what keeps the methods from comparing two detectors, each with the nearest pair that would fit.

    Args:
        catalog: which detectors and methods there are.
        methods: all that the job combines.
        student: its detector spec, complete.
        teacher: likewise.
        teacher_is_free: whether its detector may still be changed: the job trains it.
    """
    found = list(_misfits(catalog, methods, student, teacher))
    codes = {one.code for one in found}

    def _without(code: str) -> Fits:
        # Other misfits have findings of their own; a remedy must not cause new ones.
        return lambda ours, theirs: {one.code for one in _misfits(catalog, methods, ours, theirs)} <= codes - {code}

    for one in found:
        choices = [one.otherwise] if one.otherwise else []
        if one.keys:
            remedy = nearest(
                catalog, one.keys, student, teacher, teacher_is_free=teacher_is_free, fits=_without(one.code)
            )
            choices.append(remedy or "take another student or another teacher")
        yield problem(pointer(one.path), one.code, f"{one.reason}: {', or '.join(choices)}")


def _misfits(
    catalog: Catalog, methods: Sequence[Chosen], student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> Iterator[Misfit]:
    for method in methods:
        if catalog.methods[method.name]["needs_teacher"]:
            yield from _pyramid_misfits(catalog, method, student, teacher)
            yield from _head_misfits(catalog, method, student, teacher)
            yield from _part_misfits(catalog, method, student, teacher)
            yield from _weight_misfits(catalog, method, student, teacher)


def _at(student: Mapping[str, Any], key: str) -> Path:
    return ("student", "detector", key) if key in student else ("student", "detector")


def _pyramid_misfits(
    catalog: Catalog, method: Chosen, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> Iterator[Misfit]:
    needs = catalog.methods[method.name]["needs"]
    levels = catalog.deciding("levels", student, teacher)
    size = student.get("size")
    pairs = pairs_of(levels_of(catalog, student, size=size), levels_of(catalog, teacher, size=size))
    if "neck" in needs and not pairs:
        yield Misfit(
            path=_at(student, "strides"),
            code="pyramids_do_not_pair",
            reason=f"the student's pyramid has strides {strides_of(catalog, student)}, the teacher's "
            f"{strides_of(catalog, teacher)}: none in common, and levels must pair",
            keys=levels,
        )
    unlike = next(((ours, theirs) for ours, theirs in pairs if ours.channels != theirs.channels), None)
    if "equal_channels" in needs and unlike:
        others = [name for name, entry in catalog.methods.items() if entry["needs"] == ["neck"]]
        yield Misfit(
            path=_at(student, "pyramid_channels"),
            code="channels_differ",
            reason=f"at stride {unlike[0].stride} the student's pyramid has {unlike[0].channels} channels, the "
            f"teacher's {unlike[1].channels}, and this method compares them one by one",
            keys=(*catalog.deciding("channels", student, teacher), *levels),
            otherwise=f"take a method that adapts them ({', '.join(others)})" if others else None,
        )
    uneven = next(((ours, theirs) for ours, theirs in pairs if ours.side != theirs.side), None)
    if "neck" in needs and uneven:
        yield Misfit(
            path=_at(student, "size"),
            code="maps_do_not_pair",
            reason=f"the student resizes images to {size} x {size} px, of which its map at stride {uneven[0].stride} "
            f"is {uneven[0].side} cells wide, that of the teacher's {teacher['backbone']} {uneven[1].side}",
            keys=(*catalog.deciding("maps", student, teacher), *levels),
        )


def _head_misfits(
    catalog: Catalog, method: Chosen, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> Iterator[Misfit]:
    """Weights of losses that compare proposals must be 0 unless both detectors are two-stage."""
    without = {
        f"the {whose} ({detector['architecture']})": whose
        for whose, detector in (("student", student), ("teacher", teacher))
        if catalog.detectors[detector["architecture"]]["head"] != "two_stage"
    }
    two_stage = [name for name, family in catalog.detectors.items() if family["head"] == "two_stage"]
    verb = "is a one-stage detector and has" if len(without) == 1 else "are one-stage detectors and have"
    if without:
        yield from _of_weights(
            method,
            catalog.methods[method.name]["head_weights"],
            code="head_does_not_pair",
            compares=f"proposals, and {' and '.join(without)} {verb} none",
            otherwise=f"set it to 0, or take a two-stage {' and '.join(without.values())} ({', '.join(two_stage)})",
        )


def _part_misfits(
    catalog: Catalog, method: Chosen, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> Iterator[Misfit]:
    """Parts that the method needs and one of the two families does not provide."""
    families = {"student": student["architecture"], "teacher": teacher["architecture"]}
    for need in catalog.methods[method.name]["needs"]:
        who, _, part = need.partition(".")
        if part and part not in catalog.detectors[families[who]]["provides"]:
            able = ", ".join(name for name, family in catalog.detectors.items() if part in family["provides"])
            yield Misfit(
                path=(*method.path, "method"),
                code=f"{part}_missing",
                reason=f"{method.name} needs a {who} with {part}, which {families[who]} does not provide",
                otherwise=f"these do: {able}",
            )


def _weight_misfits(
    catalog: Catalog, method: Chosen, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> Iterator[Misfit]:
    entry = catalog.methods[method.name]
    ours, theirs = backbone_strides_of(catalog, student), backbone_strides_of(catalog, teacher)
    if not set(entry["backbone_strides"]) & set(ours) & set(theirs):
        yield from _of_weights(
            method,
            entry["backbone_weights"],
            code="backbones_do_not_pair",
            compares=f"the backbones' maps at strides {entry['backbone_strides']}; the student's provides "
            f"{ours or 'none'}, the teacher's {theirs or 'none'}, none of these in common",
            keys=catalog.deciding("levels", student, teacher),
        )
    if not _logits_pair(catalog, student, teacher):
        yield from _of_weights(
            method,
            entry["logit_weights"],
            code="logits_do_not_pair",
            compares=f"the class logits of both dense heads in a cell, anchor by anchor; those of "
            f"{student['architecture']} and {teacher['architecture']} have unlike classes or unlike anchors",
            keys=catalog.deciding("anchors", student, teacher),
        )


def _logits_pair(catalog: Catalog, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> bool:
    ours, theirs = catalog.detectors[student["architecture"]], catalog.detectors[teacher["architecture"]]
    if ours["head"] != theirs["head"] or "logits" not in ours["provides"]:
        return False
    if "logits" not in theirs["provides"]:  # `logits_missing` reports it
        return True
    if ("anchors" in ours["provides"]) != ("anchors" in theirs["provides"]):
        return False
    pairs = pairs_of(levels_of(catalog, student, size=None), levels_of(catalog, teacher, size=None))
    return all(mine.anchors == other.anchors for mine, other in pairs)


def _of_weights(
    method: Chosen,
    weights: Sequence[str],
    *,
    code: str,
    compares: str,
    keys: tuple[str, ...] = (),
    otherwise: str = "set it to 0",
) -> Iterator[Misfit]:
    """Return a misfit for each weight that is not 0 (null: the authors' own); `compares`: what cannot be compared."""
    for weight in weights:
        if method.value[weight] is None or method.value[weight] > 0:
            reason = f"{weight} compares {compares}"
            yield Misfit(path=(*method.path, weight), code=code, reason=reason, keys=keys, otherwise=otherwise)
