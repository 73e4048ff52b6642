"""The registry of distillation methods. Adding one is one file and one line in `METHODS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.config import Config
from worker.detectors.base import Detector
from worker.methods.base import Clock, Method
from worker.methods.baseline import Baseline, BaselineConfig
from worker.methods.cwd import CWD, CWDConfig
from worker.methods.defeat import Defeat, DefeatConfig
from worker.methods.fgd import FGD, FGDConfig
from worker.methods.fitnet import FitNet, FitNetConfig
from worker.methods.mgd import MGD, MGDConfig
from worker.methods.pkd import PKD, PKDConfig
from worker.report import RunError

__all__ = ["METHODS", "Clock", "Method", "build"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method: its config, how it is made, and what it needs of the two detectors.

    Attributes:
        needs: what student and teacher must have in common; "neck" means pyramid levels of equal stride,
            "equal_channels" as many channels on these.
        head_weights: parameters that must be 0 unless both detectors are two-stage.
    """

    summary: str
    config: type[Config]
    build: Callable[[Any, Detector, Detector | None], Method]
    needs_teacher: bool
    needs: tuple[str, ...] = ()
    head_weights: tuple[str, ...] = ()


METHODS: dict[str, Entry] = {
    "baseline": Entry(
        summary="The student's own losses alone, without a teacher.",
        config=BaselineConfig,
        build=Baseline,
        needs_teacher=False,
    ),
    "defeat": Entry(
        summary="Decoupled features: object and background of the neck, positives and negatives of the head "
        "(Guo et al., CVPR 2021).",
        config=DefeatConfig,
        build=Defeat,
        needs_teacher=True,
        needs=("neck",),
        head_weights=("head_object_weight", "head_background_weight"),
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
}


def build(spec: Mapping[str, Any], student: Detector, teacher: Detector | None) -> Method:
    """Build the method that `spec` describes (`{"method": …, …parameters}`) for this student and teacher.

    Raises:
        RunError: unknown method, unknown keys, values out of range, or detectors that it cannot pair.
    """
    name = spec.get("method")
    if name not in METHODS:
        raise RunError("user", "unknown_method", f"distillation.method is {name!r}; known: {', '.join(METHODS)}")
    entry = METHODS[name]
    return entry.build(entry.config.parse(spec, where="distillation"), student, teacher)
