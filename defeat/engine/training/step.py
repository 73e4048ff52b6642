"""One optimiser step: the losses of a batch, their gradients, and the weights that follow."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

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
from defeat.engine.training.memory import out_of_memory, what_fits
from defeat.engine.training.optim import build_optimizer, learning_rate, state_bytes
from defeat.engine.training.process_group import ProcessGroup

Result = TypeVar("Result")


class Losses(nn.Module):
    """A step's whole forward half as one module, so that no part of the loss escapes `DistributedDataParallel`."""

    def __init__(self, detector: Detector, method: Method, teacher: Detector | None, precision: torch.dtype) -> None:
        super().__init__()
        self.detector = detector
        self.method = method
        # In a tuple, not a submodule: nobody trains it, and its tensors need not travel.
        self.frozen = (teacher,)
        self.precision = precision

    def forward(self, batch: Batch, step_info: StepInfo, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return each part of the loss and, if `measured`, the norm of its gradient where all of them meet.

        The batch lies on the detector's device.
        """
        device = batch.storage.device
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            passed = self.detector.forward_train(batch.floats(), batch.targets)
            losses = {**passed.losses, **self.method(passed, self.frozen[0], step_info)}
        losses = {name.removeprefix("loss_"): loss.float() for name, loss in losses.items()}
        if not measured:
            return losses, {}
        # At the pyramid; at the backbone's maps only where a part looks at those, for the way back to them costs more.
        deeper = passed.backbone if any("backbone" in name for name in losses) else None
        return losses, gradient_norms(losses, list((deeper or passed.features).values()))


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a step says of itself.

    Attributes:
        values: means over all processes of: each part of the loss and their sum (`loss/…`); the norm before clipping
            of the detector's gradient (`gradient_norm`), and of the method's own if it is trained
            (`adapter_gradient_norm`); the learning rate; and, if it was measured, each part's share of the gradient
            norms at the pyramid (`gradient_share/…`). All are finite: in float16 a step whose gradient overflows is
            left out, and has no norms.
        ending: whether any process was asked to end.
    """

    values: dict[str, float]
    ending: bool


class Step:
    """Takes optimiser steps.

    Args:
        detector: who is trained, on the device.
        method: adds its losses; its parameters are trained along.
        teacher: frozen, in eval mode, on the device; None where the method needs none.
        schedule: how.
        group: the processes that train together; each is given its own share of every batch.
        device: where.

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

    def __call__(self, batch: Batch, step_info: StepInfo, *, measured: bool = False, cancelled: bool = False) -> Taken:
        """Take one step.

        Args:
            batch: this process's share of the batch, on the CPU or on the device.
            clock: which step it is.
            measured: whether to measure each part's share of the gradient, too.
            cancelled: whether this process was asked to end.

        Raises:
            RunError: `loss_not_finite`, naming the parts, the weights being as before the step; `out_of_memory`.
        """
        rate = learning_rate(self.schedule, step=step_info.step, steps_per_epoch=step_info.steps // step_info.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)

        # Forward and backward.
        losses, norms = self._with_memory(partial(self._backward, batch, step_info, measured), batch, step_info)

        # Clip the detector's gradient and the method's, each by itself.
        self.scaler.unscale_(self.optimizer)
        lengths = {name: self._clip(parameters) for name, parameters in self._clipped.items() if parameters}

        # All numbers in one copy, the only time that this step waits for the device.
        named = {f"loss/{name}": loss for name, loss in losses.items()} | lengths
        named |= {f"norm/{name}": norm for name, norm in norms.items()}
        named["ending"] = torch.full((), float(cancelled), device=self.device)
        means = self.group.mean(torch.stack(list(named.values()))).tolist()
        values = dict(zip(named, means, strict=True))

        # Update. In float16 a gradient that overflows is what the scaler is there for: such a step is left out.
        finite = all(math.isfinite(values[name]) for name in lengths)
        self._require_finite(values, finite or self.scaler.is_enabled(), step_info)
        if finite:
            # In its first step it makes its state, which may be as large as the weights, or twice that.
            self._with_memory(self.optimizer.step, batch, step_info)
        self.scaler.update()
        return Taken(values=_shown(values, rate), ending=values["ending"] > 0)

    def _backward(
        self, batch: Batch, step_info: StepInfo, measured: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add up the gradients of the batch, part by part; return the means of losses and gradient norms."""
        count = self.schedule.accumulation
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for index, piece in enumerate(batch.split(count)):
            with self._exchange(index == count - 1):
                found, pulls = self._forward(piece, step_info, measured)
                mean = torch.stack(list(found.values())).sum() / count
                self.scaler.scale(mean).backward()
            for into, values in ((losses, found), (norms, pulls)):
                for name, value in values.items():
                    into[name] = into.get(name, torch.zeros((), device=self.device)) + value.detach() / count
        return losses, norms

    def _with_memory(self, work: Callable[[], Result], batch: Batch, step_info: StepInfo) -> Result:
        """Do something that takes memory.

        Raises:
            RunError: `out_of_memory`, with the part of the batch that would fit. One of several processes looks for
                none: what it would have to exchange, the others do not wait for.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            told = str(error)
        # Not in the handler: the error's traceback holds the failed pass, and with it the memory that it took.
        least = self.losses.detector.least_images
        alone = self.group.is_single
        advice = what_fits(partial(self._attempt, step_info), batch, self.schedule, least=least) if alone else None
        raise out_of_memory(told, batch, self.schedule, advice)

    def _attempt(self, step_info: StepInfo, piece: Batch) -> None:
        """Go forward and backward beside what the optimiser will want in its first step, and change nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        reserved = torch.empty(state_bytes(self.optimizer), dtype=torch.uint8, device=self.device)
        losses, _ = self.losses(piece, step_info, False)
        torch.stack(list(losses.values())).sum().backward()
        del reserved

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one part's passes: gradients are exchanged with the last part's, once."""
        if last or not isinstance(self._forward, DistributedDataParallel):
            return nullcontext()
        return self._forward.no_sync()

    def _clip(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Clip the gradients of the parameters together, and return their norm before that."""
        norm = nn.utils.clip_grad_norm_(parameters, self.schedule.gradient_clip or math.inf)
        return norm.to(self.device)  # of no gradients at all it is made on the CPU

    def _require_finite(self, values: dict[str, float], norms_are_good: bool, step_info: StepInfo) -> None:
        parts = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        if norms_are_good and all(map(math.isfinite, parts.values())):
            return
        shown = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        raise RunError(
            "user",
            "loss_not_finite",
            f"the loss or its gradient is not finite at step {step_info.step} ({shown}; gradient norm "
            f"{values['gradient_norm']:.4g}); lower the learning_rate",
        )


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _prepare(detector: Detector, schedule: ScheduleConfig) -> None:
    if schedule.channels_last:
        detector.to(memory_format=torch.channels_last)
    if schedule.compile:
        # A measured step goes backward through the trunk more than once, which freed buffers forbid.
        torch._functorch.config.donated_buffer = False
        detector.compile_trunk()


def _shown(values: dict[str, float], rate: float) -> dict[str, float]:
    """Return the values as they are logged: with the sum of the losses, shares instead of norms, and finite."""
    losses = {name: value for name, value in values.items() if name.startswith("loss/")}
    norms = {name.removeprefix("norm/"): value for name, value in values.items() if name.startswith("norm/")}
    shown = {"loss/total": math.fsum(losses.values()), **losses, "learning_rate": rate}
    shown |= {name: value for name, value in values.items() if name.endswith("gradient_norm") and math.isfinite(value)}
    whole = sum(norms.values())
    if 0 < whole < math.inf:
        shown |= {f"gradient_share/{name}": norm / whole for name, norm in norms.items()}
    return shown
