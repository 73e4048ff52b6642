"""Combinations of methods: their losses are added, and they share one pass of the teacher."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from defeat.engine.config import Config
from defeat.engine.detectors.base import TrainPass
from defeat.engine.methods.base import Method, StepInfo, TeacherPass


class MemberConfig(Config):
    """The key that a method has in a combination, in addition to its own parameters."""

    weight: Annotated[
        float, Field(description="Factor of all losses of this method in the combination.", gt=0, le=1000)
    ] = 1.0


class Combined(Method):
    """The losses of all methods, each times its weight and under its method's name: `pkd/neck`."""

    def __init__(self, members: Sequence[tuple[str, float, Method]]) -> None:
        """Combine methods, given as name, weight and method; no name twice."""
        super().__init__()
        self.weights = {name: weight for name, weight, _ in members}
        self.warmup_steps = max(method.warmup_steps for _, _, method in members)
        self.compares_backbones = any(method.compares_backbones for _, _, method in members)
        self.methods = nn.ModuleDict({name: method for name, _, method in members})

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:
        """See `Method.losses`."""
        losses: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            assert isinstance(method, Method)
            own = method.losses(student, teacher, step_info)
            losses |= {f"{name}/{part}": self.weights[name] * loss for part, loss in own.items()}
        return losses
