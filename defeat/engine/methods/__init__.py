"""The registry of distillation methods. Adding one is one file and one line in `METHODS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector
from defeat.engine.methods.base import Method, StepInfo
from defeat.engine.methods.baseline import Baseline, BaselineConfig
from defeat.engine.methods.combined import Combined, MemberConfig
from defeat.engine.methods.cwd import CWD, CWDConfig
from defeat.engine.methods.defeat import Defeat, DefeatConfig
from defeat.engine.methods.fgd import FGD, FGDConfig
from defeat.engine.methods.fgfi import FGFI, FGFIConfig
from defeat.engine.methods.fitnet import FitNet, FitNetConfig
from defeat.engine.methods.frs import FRS, FRSConfig
from defeat.engine.methods.mgd import MGD, MGDConfig
from defeat.engine.methods.pkd import PKD, PKDConfig
from defeat.engine.report import RunError

__all__ = ["METHODS", "Method", "StepInfo", "build"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method: its config, how it is made, and what it needs of the two detectors.

    Attributes:
        needs: what the two detectors must have: "neck", pyramid levels of equal stride; "equal_channels", as many
            channels on these; "student.X" or "teacher.X", that this one provides X (see `Detector.provides`).
        head_weights: parameters that must be 0 unless both detectors are two-stage.
        backbone_weights: parameters that must be 0 unless both detectors provide their backbone's maps.
        logit_weights: parameters that must be 0 unless the student provides class logits of cells as well, and its head
            is of the teacher's kind; null counts as a weight.
    """

    summary: str
    config: type[Config]
    build: Callable[[Any, Detector, Detector | None], Method]
    needs_teacher: bool
    needs: tuple[str, ...] = ()
    head_weights: tuple[str, ...] = ()
    backbone_weights: tuple[str, ...] = ()
    logit_weights: tuple[str, ...] = ()

    @property
    def weights(self) -> list[str]:
        """Parameters that weigh a part of the loss: those named `…_weight`, of which one at least must not be 0."""
        return [name for name in self.config.model_fields if name.endswith("_weight")]


METHODS: dict[str, Entry] = {
    "baseline": Entry(
        summary="The student's own losses alone, without a teacher.",
        config=BaselineConfig,
        build=Baseline,
        needs_teacher=False,
    ),
    "defeat": Entry(
        summary="Decoupled features: object and background of the neck and the backbone, positives and negatives of "
        "the head (Guo et al., CVPR 2021).",
        config=DefeatConfig,
        build=Defeat,
        needs_teacher=True,
        needs=("neck",),
        head_weights=("head_object_weight", "head_background_weight"),
        backbone_weights=("backbone_object_weight", "backbone_background_weight"),
    ),
    "fitnet": Entry(
        summary="The whole neck alike, squared differences (Romero et al., ICLR 2015).",
        config=FitNetConfig,
        build=FitNet,
        needs_teacher=True,
        needs=("neck",),
    ),
    "pkd": Entry(
        summary="The neck's correlation, channel by channel; for pyramids of equally many channels "
        "(Cao et al., NeurIPS 2022).",
        config=PKDConfig,
        build=PKD,
        needs_teacher=True,
        needs=("neck", "equal_channels"),
    ),
    "cwd": Entry(
        summary="Where each channel of the neck looks, as distributions over its cells (Shu et al., ICCV 2021).",
        config=CWDConfig,
        build=CWD,
        needs_teacher=True,
        needs=("neck",),
    ),
    "fgd": Entry(
        summary="The neck where the teacher's attention lies, objects and background apart, and its global relations "
        "(Yang et al., CVPR 2022).",
        config=FGDConfig,
        build=FGD,
        needs_teacher=True,
        needs=("neck",),
    ),
    "mgd": Entry(
        summary="Generating the teacher's neck from the student's with most cells blanked (Yang et al., ECCV 2022).",
        config=MGDConfig,
        build=MGD,
        needs_teacher=True,
        needs=("neck",),
    ),
    "fgfi": Entry(
        summary="The neck where anchors lie near objects; for students with anchors (Wang et al., CVPR 2019).",
        config=FGFIConfig,
        build=FGFI,
        needs_teacher=True,
        needs=("neck", "student.anchors"),
    ),
    "frs": Entry(
        summary="The neck and the scores of its cells, where the teacher sees something (Du et al., NeurIPS 2021).",
        config=FRSConfig,
        build=FRS,
        needs_teacher=True,
        needs=("neck", "teacher.logits"),
        logit_weights=("logits_weight",),
    ),
}


def build(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]], student: Detector, teacher: Detector | None) -> Method:
    """Build what `spec` describes for this student and teacher.

    Args:
        spec: `{"method": …, …parameters}`, or a list of at least two of these, each with a `weight` besides.
        student: who learns.
        teacher: from whom; None where the method needs none.

    Raises:
        RunError: unknown method, unknown keys, values out of range, `weights_all_zero`, or detectors that it cannot
            pair; of a list also `bad_combination`: too short, a method twice, or one without a teacher.
    """
    if isinstance(spec, Mapping):
        return _build(spec, student, teacher, where="distillation")
    _check_combination(spec)
    members = []
    for index, one in enumerate(spec):
        where = f"distillation.{index}"
        given = {key: value for key, value in one.items() if key in MemberConfig.model_fields}
        own = {key: value for key, value in one.items() if key not in given}
        weight = MemberConfig.parse(given, where=where).weight
        members.append((str(one["method"]), weight, _build(own, student, teacher, where=where)))
    return Combined(members)


def _check_combination(specs: Sequence[Mapping[str, Any]]) -> None:
    names = [one.get("method") for one in specs]
    if len(specs) < 2:
        problem = f"a list combines at least two methods; got {len(specs)}: give a single one as it is, without a list"
    elif repeated := [name for name in names if names.count(name) > 1]:
        problem = (
            f"each method may stand in a combination once; {repeated[0]} stands there {names.count(repeated[0])} times"
        )
    elif alone := [name for name in names if name in METHODS and not METHODS[name].needs_teacher]:
        problem = f"{alone[0]} teaches nothing and cannot be combined: leave it out"
    else:
        return
    raise RunError("user", "bad_combination", f"distillation: {problem}")


def _build(spec: Mapping[str, Any], student: Detector, teacher: Detector | None, *, where: str) -> Method:
    name = spec.get("method")
    if name not in METHODS:
        raise RunError("user", "unknown_method", f"{where}.method is {name!r}; known: {', '.join(METHODS)}")
    entry = METHODS[name]
    config = entry.config.parse(spec, where=where)
    if entry.weights and all(getattr(config, weight) == 0 for weight in entry.weights):
        raise RunError(
            "user",
            "weights_all_zero",
            f"{where}: every weight is 0 ({', '.join(entry.weights)}), so {name} would distil nothing: give one, or "
            "take the method baseline",
        )
    return entry.build(config, student, teacher)
