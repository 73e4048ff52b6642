"""The training checkpoint: everything that another attempt needs to go on as if nothing had happened."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defeat.engine.report import RunError, Subject, write_atomically

FORMAT_VERSION = 3
# Version 2 has one group of parameters in the optimiser's state, see `optim.restore`.
READABLE_VERSIONS = (2, 3)


@dataclass(kw_only=True)
class Best:
    """The best detector so far, by AP on the evaluation split."""

    epoch: int
    metrics: dict[str, Any]
    model: dict[str, Tensor]


@dataclass(kw_only=True)
class TrainingState:
    """Where a run stands after an optimiser step.

    Random states are not in it: each step seeds its own (`seeds`), and the sampler's order follows from the epoch.

    Attributes:
        subject: who is being trained.
        epoch: completed epochs.
        step: completed steps of the epoch after those.
        model: the detector's tensors.
        method: the method's tensors (adapters).
        optimizer: the optimiser's state.
        scaler: the loss scaler's state; empty unless in float16.
        average: the moving average of the detector's tensors, where one is kept.
        running: sums of the metrics that were not logged yet, and how often each was counted.
        quiet_steps: for each part of the loss, how many steps up to now it has been 0.
        best: the best detector so far, if any was evaluated.
        teacher: tensors of a teacher that this job trained, once the student is being trained.
        teacher_metrics: the teacher's evaluation, likewise.
        done: how much of the whole run is done, as `train.Plan` counts it.
        history: everything logged so far, for `metrics.json`.
    """

    subject: Subject
    epoch: int
    step: int
    model: dict[str, Tensor]
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    average: dict[str, Tensor] | None
    running: dict[str, dict[str, Any]]
    quiet_steps: dict[str, int]
    best: Best | None
    teacher: dict[str, Tensor] | None
    teacher_metrics: dict[str, Any] | None
    done: float
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the state, atomically: whatever happens, `path` holds a whole checkpoint or what it held before."""
        # Not asdict for the tensors: it would copy them one by one.
        document = {name: getattr(self, name) for name in self.__dataclass_fields__}
        document["best"] = self.best and {name: getattr(self.best, name) for name in Best.__dataclass_fields__}
        buffer = io.BytesIO()
        torch.save({"format_version": FORMAT_VERSION, **document}, buffer)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "TrainingState":
        """Read a state that `save` wrote, its tensors onto the CPU, wherever they were.

        Raises:
            RunError: `checkpoint_unreadable` if the file is cut off or of another version.
        """
        try:
            document = torch.load(path, map_location="cpu", weights_only=True)
            if document.pop("format_version") not in READABLE_VERSIONS:
                raise RunError("infra", "checkpoint_unreadable", f"{path.name} was written by another version")
            best = document.pop("best")
            return cls(best=Best(**best) if best else None, **document)
        except RunError:
            raise
        except Exception as error:  # torch.load's errors on a damaged file are many
            raise RunError("infra", "checkpoint_unreadable", f"{path.name} cannot be read: {error}"[:500]) from error
