"""The state of one training: what a training checkpoint saves and restores of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from defeat.engine.detectors.base import Detector
from defeat.engine.methods.base import Method
from defeat.engine.training.checkpoint import Best, TrainingCheckpoint
from defeat.engine.training.ema import EMA
from defeat.engine.training.health import Monitor
from defeat.engine.training.logger import MeanMetrics
from defeat.engine.training.optim import restore


@dataclass(kw_only=True)
class TrainState:
    """All that changes while one detector is trained, except the run's progress and its logged metrics.

    Attributes:
        detector: the detector in training.
        method: the method, whose adapters are trained as well.
        optimizer: the optimiser over both.
        scaler: the loss scaler.
        ema: the moving average of the detector's weights, if the schedule has one; it is then what is evaluated.
        monitor: counts steps without effect.
        metrics: the means since metrics were last logged.
        best: the best detector so far.
    """

    detector: Detector
    method: Method
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    monitor: Monitor
    metrics: MeanMetrics = field(default_factory=MeanMetrics)
    best: Best | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the members of `TrainingCheckpoint` that describe this training."""
        return {
            "model": self.detector.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.ema.tensors if self.ema else None,
            "running": {"sums": dict(self.metrics.sums), "steps": dict(self.metrics.steps)},
            "quiet_steps": dict(self.monitor.quiet_steps),
            "best": self.best,
        }

    def load(self, checkpoint: TrainingCheckpoint) -> None:
        """Restore the state that a checkpoint of the same training holds."""
        self.detector.load_state_dict(checkpoint.model)
        self.method.load_state_dict(checkpoint.method)
        restore(self.optimizer, checkpoint.optimizer)
        self.scaler.load_state_dict(checkpoint.scaler)
        if self.ema and checkpoint.average is not None:
            for name, tensor in checkpoint.average.items():
                self.ema.tensors[name].copy_(tensor)
        self.metrics = MeanMetrics(**checkpoint.running)
        self.monitor.quiet_steps = checkpoint.quiet_steps
        self.best = checkpoint.best

    def synchronised_tensors(self) -> Iterator[Tensor]:
        """Yield what processes that train together do not have in common, and must before an evaluation."""
        yield from self.detector.buffers()
        yield from self.ema.tensors.values() if self.ema else ()

    def evaluated(self) -> AbstractContextManager[None]:
        """Let the detector use the weights that are evaluated: the moving average's, or its own."""
        return self.ema.applied(self.detector) if self.ema else nullcontext()

    def evaluated_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are evaluated, by name."""
        return self.ema.tensors if self.ema else self.detector.state_dict()

    def keep_best(self, *, epoch: int, metrics: dict[str, Any]) -> None:
        """Copy the evaluated tensors to the CPU if their AP is the best so far: a GPU holds enough already."""
        if self.best is None or (metrics["ap"] or 0.0) > (self.best.metrics["ap"] or 0.0):
            model = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.evaluated_tensors().items()}
            self.best = Best(epoch=epoch, metrics=metrics, model=model)
