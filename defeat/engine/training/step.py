"""One optimiser step: the losses of a batch, their gradients, and the update of the weights."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defeat.engine.data.loading.batch import Batch
from defeat.engine.detectors.base import Detector
from defeat.engine.methods.balance import gradient_norms
from defeat.engine.methods.base import Method, StepInfo
from defeat.engine.numerics import PRECISIONS
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.memory import BatchSizeSearch
from defeat.engine.training.optim import build_optimizer, learning_rate
from defeat.engine.training.process_group import ProcessGroup


class Losses(nn.Module):
    """The forward half of a step as one module, so that `DistributedDataParallel` covers every part of the loss."""

    def __init__(self, detector: Detector, method: Method, teacher: Detector | None, precision: torch.dtype) -> None:
        super().__init__()
        self.detector = detector
        self.method = method
        # In a tuple, so that it is no submodule: it is not trained, and its tensors need not be exchanged.
        self.frozen = (teacher,)
        self.precision = precision

    def forward(self, batch: Batch, step_info: StepInfo, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return each part of the loss and, if `measured`, its gradient norm at the features that all parts share.

        The batch is on the detector's device.
        """
        device = batch.storage.device
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            passed = self.detector.forward_train(batch.floats(), batch.targets)
            losses = {**passed.losses, **self.method(passed, self.frozen[0], step_info)}
        losses = {name.removeprefix("loss_"): loss.float() for name, loss in losses.items()}
        if not measured:
            return losses, {}
        # At the pyramid; at the backbone's maps only if a part compares those, for the way back to them costs more.
        deeper = passed.backbone if self.method.compares_backbones else None
        return losses, gradient_norms(losses, list((deeper or passed.features).values()))


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of a step.

    Attributes:
        values: means over all processes of: each part of the loss and their sum (`loss/…`); the norm before clipping
            of the detector's gradient (`gradient_norm`), and of the method's own if it is trained
            (`adapter_gradient_norm`); the learning rate; and, if measured, each part's share of the sum of gradient
            norms (`gradient_share/…`). All are finite: a float16 step whose gradient overflows is skipped, and has
            no norms.
        cancelled: whether any process was asked to end.
    """

    values: dict[str, float]
    cancelled: bool


@dataclass(frozen=True)
class _Numbers:
    """A step's numbers on the CPU, each by name.

    Attributes:
        losses: the parts of the loss.
        norms: gradient norms before clipping, of the detector and of the method.
        part_norms: gradient norms of the parts of the loss, if measured.
        flags: `cancelled`: above 0 if any process was asked to end.
    """

    losses: dict[str, float]
    norms: dict[str, float]
    part_norms: dict[str, float]
    flags: dict[str, float]

    def metrics(self, rate: float) -> dict[str, float]:
        """Return `StepResult.values`: with the sum of the losses, shares instead of norms, and finite."""
        metrics = {"loss/total": math.fsum(self.losses.values())}
        metrics |= {f"loss/{name}": value for name, value in self.losses.items()}
        metrics["learning_rate"] = rate
        metrics |= {name: value for name, value in self.norms.items() if math.isfinite(value)}
        total = sum(self.part_norms.values())
        if 0 < total < math.inf:
            metrics |= {f"gradient_share/{name}": norm / total for name, norm in self.part_norms.items()}
        return metrics


class Step:
    """Takes optimiser steps.

    Args:
        detector: the detector to train, on the device.
        method: the distillation method; its parameters are trained as well.
        teacher: frozen, in eval mode, on the device; None where the method needs none.
        schedule: the detector's schedule.
        group: the processes that train together; each is given its own share of every batch.
        device: where it is trained.

    Attributes:
        optimizer: the optimiser over the detector's and the method's parameters.
        scaler: scales the losses in float16, and does nothing otherwise.
        losses: the forward half, in this process.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        method: Method,
        teacher: Detector | None,
        schedule: ScheduleConfig,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        self.schedule = schedule
        self.group = group
        self.device = device
        for one in (detector, teacher):
            if one is not None:
                _prepare(one, schedule)
        if schedule.sync_batch_norm and not group.is_single:
            detector.synchronise_batch_norm()
        self.losses = Losses(detector, method, teacher, PRECISIONS[schedule.precision])
        self.optimizer = build_optimizer((detector, method), schedule)
        self.scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "float16")
        self._clipped = {"gradient_norm": _trainable(detector), "adapter_gradient_norm": _trainable(method)}
        self._forward = group.wrap(self.losses, device, unused=detector.leaves_parameters_out)
        self._search = BatchSizeSearch(
            detector,
            self.losses,
            optimizer=self.optimizer,
            schedule=schedule,
            device=device,
            single=group.is_single,
        )

    def __call__(
        self, batch: Batch, step_info: StepInfo, *, measured: bool = False, cancelled: bool = False
    ) -> StepResult:
        """Take one step.

        Args:
            batch: this process's share of the batch, on the CPU or on the device.
            step_info: the step's number.
            measured: whether to measure each part's share of the gradient as well.
            cancelled: whether this process was asked to end.

        Raises:
            RunError: `loss_not_finite`, naming the parts, with the weights as before the step; `out_of_memory`, with
                the part of the batch that would fit.
        """
        batch = batch.to(self.device)
        try:
            return self._take(batch, step_info, measured=measured, cancelled=cancelled)
        except torch.OutOfMemoryError as error:
            message = str(error)
        raise self._search.error(message, batch, step_info)

    def _take(self, batch: Batch, step_info: StepInfo, *, measured: bool, cancelled: bool) -> StepResult:
        rate = self._set_learning_rate(step_info)
        self.optimizer.zero_grad(set_to_none=True)

        # Forward and backward.
        losses, part_norms = self._backward(batch, step_info, measured)

        # Clip the detector's gradient and the method's, each by itself.
        self.scaler.unscale_(self.optimizer)
        norms = {name: self._clip(parameters) for name, parameters in self._clipped.items() if parameters}

        # One copy of all numbers to the CPU: the only time that a step waits for the device.
        flags = {"cancelled": torch.full((), float(cancelled), device=self.device)}
        numbers = _Numbers(*self._to_cpu(losses, norms, part_norms, flags))

        # Update. In float16 a gradient may overflow until the scaler has adapted: such a step is skipped.
        finite = all(map(math.isfinite, numbers.norms.values()))
        self._require_finite(numbers, finite or self.scaler.is_enabled(), step_info)
        if finite:
            self.optimizer.step()
        self.scaler.update()
        return StepResult(values=numbers.metrics(rate), cancelled=numbers.flags["cancelled"] > 0)

    def _set_learning_rate(self, step_info: StepInfo) -> float:
        steps_per_epoch = step_info.steps // step_info.epochs
        rate = learning_rate(self.schedule, step=step_info.step, steps_per_epoch=steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _backward(
        self, batch: Batch, step_info: StepInfo, measured: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Accumulate the gradients of the batch, part by part; return the means of losses and gradient norms."""
        count = self.schedule.accumulation
        mean_losses: dict[str, Tensor] = {}
        mean_norms: dict[str, Tensor] = {}
        for index, part in enumerate(batch.split(count)):
            with self._synchronised(last=index == count - 1):
                losses, norms = self._forward(part, step_info, measured)
                total = torch.stack(list(losses.values())).sum() / count
                self.scaler.scale(total).backward()
            for means, values in ((mean_losses, losses), (mean_norms, norms)):
                for name, value in values.items():
                    means[name] = means.get(name, torch.zeros((), device=self.device)) + value.detach() / count
        return mean_losses, mean_norms

    def _synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one part's passes: gradients are exchanged with the last part's, once."""
        if last or not isinstance(self._forward, DistributedDataParallel):
            return nullcontext()
        return self._forward.no_sync()

    def _clip(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Clip the gradients of the parameters together, and return their norm before that."""
        norm = nn.utils.clip_grad_norm_(parameters, self.schedule.gradient_clip or math.inf)
        return norm.to(self.device)  # without any gradient it is made on the CPU

    def _to_cpu(self, *groups: Mapping[str, Tensor]) -> list[dict[str, float]]:
        """Return each group of scalars by name, averaged over all processes, by one copy for all groups together."""
        stacked = torch.stack([value for group in groups for value in group.values()])
        means = iter(self.group.mean(stacked).tolist())
        return [{name: next(means) for name in group} for group in groups]

    def _require_finite(self, numbers: _Numbers, norms_are_good: bool, step_info: StepInfo) -> None:
        if norms_are_good and all(map(math.isfinite, numbers.losses.values())):
            return
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.losses.items())
        raise RunError(
            "user",
            "loss_not_finite",
            f"the loss or its gradient is not finite at step {step_info.step} ({shown}; gradient norm "
            f"{numbers.norms['gradient_norm']:.4g}); lower the learning_rate",
        )


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _prepare(detector: Detector, schedule: ScheduleConfig) -> None:
    if schedule.channels_last:
        detector.to(memory_format=torch.channels_last)
    if schedule.compile:
        # A measured step goes backward through the trunk more than once, which donated buffers do not allow.
        torch._functorch.config.donated_buffer = False
        detector.compile_trunk()
