"""No distillation: the student's own losses alone, the reference for every method."""

from typing import Literal

from torch import Tensor

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.methods.base import Method, StepInfo
from defeat.engine.methods.entry import Entry


class BaselineConfig(Config):
    """The baseline has no parameters."""

    method: Literal["baseline"] = "baseline"


class Baseline(Method):
    """Adds nothing."""

    def __init__(self, config: BaselineConfig, student: Detector, teacher: Detector | None) -> None:  # noqa: ARG002
        super().__init__()

    def forward(self, student: TrainPass, teacher: Detector | None, step_info: StepInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.forward`."""
        return {}


METHOD = Entry(
    summary="The student's own losses alone, without a teacher.",
    config=BaselineConfig,
    build=Baseline,
    needs_teacher=False,
)
