"""The training checkpoint: everything that another attempt needs to continue as if nothing had happened."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defeat.engine.events import Subject
from defeat.engine.report import RunError, write_atomically

FORMAT_VERSION = 3
# In version 2 the optimiser's state has one group of parameters, see `optim.restore`.
READABLE_VERSIONS = (2, 3)


@dataclass(kw_only=True)
class Best:
    """The best detector so far, by AP on the evaluation split: after which epoch, its metrics and its tensors."""

    epoch: int
    metrics: dict[str, Any]
    model: dict[str, Tensor]


@dataclass(kw_only=True)
class TrainingCheckpoint:
    """The state of a run after an optimiser step. The attributes' names are the keys of the file.

    Random states are not in it: each step seeds its own (`seeds`), and the sampler's order follows from the epoch.

    Attributes:
        subject: the detector in training.
        epoch: completed epochs.
        step: completed steps of the epoch after those.
        model: the detector's tensors.
        method: the method's tensors (adapters).
        optimizer: the optimiser's state.
        scaler: the loss scaler's state; empty unless in float16.
        average: the exponential moving average of the detector's tensors, if there is one.
        running: sums of the metrics that are not logged yet, and in how many steps each was counted.
        quiet_steps: see `health.Monitor`.
        best: the best detector so far, if any was evaluated.
        teacher: tensors of the teacher that this run trained, once the student is in training.
        teacher_metrics: the teacher's evaluation, likewise.
        done: the work done, see `logger.Progress`.
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
    teacher: dict[str, Tensor] | None = None
    teacher_metrics: dict[str, Any] | None = None
    done: float
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically: on any failure `path` holds what it held before.

        Raises:
            RunError: `disk_full`.
        """
        # Not `asdict`: it would copy the tensors one by one.
        document = {name: getattr(self, name) for name in self.__dataclass_fields__}
        document["best"] = self.best and {name: getattr(self.best, name) for name in Best.__dataclass_fields__}
        buffer = io.BytesIO()
        torch.save({"format_version": FORMAT_VERSION, **document}, buffer)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "TrainingCheckpoint":
        """Read a checkpoint that `save` wrote, with its tensors on the CPU whatever device they were on.

        Raises:
            RunError: `checkpoint_unreadable` if the file is incomplete or of another version.
        """
        try:
            document = torch.load(path, map_location="cpu", weights_only=True)
            version = document.pop("format_version")
            if version not in READABLE_VERSIONS:
                readable = " and ".join(map(str, READABLE_VERSIONS))
                raise RunError(
                    "infra",
                    "checkpoint_unreadable",
                    f"{path.name} has format version {version!r}; this version reads {readable}",
                )
            best = document.pop("best")
            return cls(best=Best(**best) if best else None, **document)
        except RunError:
            raise
        except Exception as error:  # torch.load's errors on a damaged file are many
            raise RunError("infra", "checkpoint_unreadable", f"{path.name} cannot be read: {error}"[:500]) from error
