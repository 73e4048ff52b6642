"""One optimiser step: the losses of a batch, their gradients, and the weights that follow."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from worker.data.loader import Batch
from worker.detectors.base import Detector
from worker.engine.config import ScheduleConfig
from worker.engine.evaluate import to_float
from worker.engine.optim import build_optimizer, learning_rate
from worker.engine.world import World
from worker.methods.balance import gradient_norms
from worker.methods.base import Clock, Method
from worker.report import RunError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Losses(nn.Module):
    """A step's whole forward half as one module, so that no part of the loss escapes `DistributedDataParallel`."""

    def __init__(self, detector: Detector, method: Method, teacher: Detector | None, precision: torch.dtype) -> None:
        super().__init__()
        self.detector = detector
        self.method = method
        # In a tuple, not a submodule: nobody trains it, and its tensors need not travel.
        self.frozen = (teacher,)
        self.precision = precision

    def forward(self, batch: Batch, clock: Clock, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return each part of the loss and, if `measured`, the norm of its gradient where all of them meet."""
        device = next(self.detector.parameters()).device
        images = [to_float(image, device) for image in batch.images]
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            passed = self.detector.train_pass(images, batch.targets_on(device))
            losses = {**passed.losses, **self.method(passed, self.frozen[0], clock)}
        losses = {name.removeprefix("loss_"): loss.float() for name, loss in losses.items()}
        if not measured:
            return losses, {}
        # At the pyramid; at the backbone's maps only where a part looks at those, for the way back to them costs more.
        deeper = passed.backbone if any("backbone" in name for name in losses) else None
        return losses, gradient_norms(losses, list((deeper or passed.features).values()))


class Step:
    """Takes optimiser steps.

    Args:
        detector: who is trained, on the device.
        method: adds its losses; its parameters are trained along.
        teacher: frozen, in eval mode, on the device; None where the method needs none.
        schedule: how.
        world: the processes that train together; each is given its own share of every batch.
        device: where.

    Attributes:
        optimizer: the optimiser over the detector's and the method's parameters.
        scaler: scales the losses in float16, and does nothing otherwise.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        method: Method,
        teacher: Detector | None,
        schedule: ScheduleConfig,
        world: World,
        device: torch.device,
    ) -> None:
        self.schedule = schedule
        self.world = world
        self.device = device
        for one in (detector, teacher):
            if one is not None:
                _prepare(one, schedule)
        if schedule.sync_batch_norm and not world.alone:
            detector.synchronise_batch_norm()
        self.losses = Losses(detector, method, teacher, PRECISIONS[schedule.precision])
        self.optimizer = build_optimizer(self.losses.parameters(), schedule)
        self.scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "float16")
        self._forward = world.wrap(self.losses, device)

    def __call__(
        self, batch: Batch, clock: Clock, *, measured: bool = False, cancelled: bool = False
    ) -> tuple[dict[str, float], bool]:
        """Take one step.

        Args:
            batch: this process's share of the batch.
            clock: which step it is.
            measured: whether to measure each part's share of the gradient, too.
            cancelled: whether this process was asked to end.

        Returns:
            Means over all processes of: each part of the loss and their sum (`loss/…`), the norm of the whole gradient
            before clipping, the learning rate, and, if `measured`, each part's share of the gradient norms at the
            pyramid (`gradient_share/…`); and whether any process was asked to end. All are finite: in float16 a step
            whose gradient overflows is left out, and has no norm.

        Raises:
            RunError: `loss_not_finite`, naming the parts, the weights being as before the step; `out_of_memory`.
        """
        rate = learning_rate(self.schedule, step=clock.step, steps_per_epoch=clock.steps // clock.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        exhausted = None
        try:
            losses, norms = self._backward(batch, clock, measured)
        except torch.OutOfMemoryError as error:
            exhausted = str(error)
        if exhausted is not None:
            # Not in the handler: the error's traceback holds the failed pass, and with it the memory that it took.
            raise self._out_of_memory(batch, clock, exhausted)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters(), self.schedule.gradient_clip or math.inf)
        # All numbers in one copy: each copy of its own would wait for the device.
        numbers = [*losses.values(), *norms.values(), norm, torch.tensor(float(cancelled), device=self.device)]
        *values, length, ending = self.world.mean(torch.stack(numbers)).tolist()
        parts = dict(zip(losses, values, strict=False))
        self._require_finite(parts, length, clock)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return _named(parts, dict(zip(norms, values[len(losses) :], strict=True)), length, rate), ending > 0

    def _backward(self, batch: Batch, clock: Clock, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add up the gradients of the batch, part by part; return the means of losses and gradient norms."""
        pieces = list(split(batch, self.schedule.accumulation))
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for index, piece in enumerate(pieces):
            with self._exchange(index == len(pieces) - 1):
                found, pulls = self._forward(piece, clock, measured)
                mean = torch.stack(list(found.values())).sum() / len(pieces)
                self.scaler.scale(mean).backward()
            for into, values in ((losses, found), (norms, pulls)):
                for name, value in values.items():
                    into[name] = into.get(name, torch.zeros((), device=self.device)) + value.detach() / len(pieces)
        return losses, norms

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one part's passes: gradients are exchanged with the last part's, once."""
        if last or not isinstance(self._forward, DistributedDataParallel):
            return nullcontext()
        return self._forward.no_sync()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _require_finite(self, parts: dict[str, float], norm: float, clock: Clock) -> None:
        # In float16 a gradient that overflows is what the scaler is there for: it leaves the step out.
        good = all(map(math.isfinite, parts.values())) and (math.isfinite(norm) or self.scaler.is_enabled())
        if not good:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
            raise RunError(
                "user",
                "loss_not_finite",
                f"the loss or its gradient is not finite at step {clock.step} ({shown}; gradient norm {norm:.4g}); "
                "lower the learning_rate",
            )

    def _fits(self, piece: Batch, clock: Clock) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            losses, _ = self.losses(piece, clock, False)
            torch.stack(list(losses.values())).sum().backward()
        except torch.OutOfMemoryError:
            return False
        return True

    def _out_of_memory(self, batch: Batch, clock: Clock, told: str) -> RunError:
        """Find out, by trying, which part of the batch fits, and say so.

        One of several processes tries nothing: what it would have to exchange, the others do not wait for.
        """
        share = len(batch.images) // self.schedule.accumulation
        found = f"; {self._what_fits(batch, share, clock)}" if self.world.alone else ""
        first = told.split("\n", 1)[0][:300]
        return RunError("oom", "out_of_memory", f"{share} pictures at a time do not fit into memory{found} ({first})")

    def _what_fits(self, batch: Batch, share: int, clock: Clock) -> str:
        least, schedule = self.losses.detector.least_pictures, self.schedule
        smaller = [size for size in range(share - 1, least - 1, -1) if share % size == 0]
        fits = next((size for size in smaller if self._fits(next(split(batch, len(batch.images) // size)), clock)), 0)
        if not fits:
            few = "one picture fits" if least == 1 else f"{least} pictures fit"
            return f"not even {few}: lower the detector's min_size and max_size, or take a smaller one"
        return (
            f"{fits} at a time fit: that is accumulation {schedule.batch_size // fits} for the same batch_size "
            f"{schedule.batch_size}, or batch_size {fits * schedule.accumulation}"
        )


def split(batch: Batch, count: int) -> Iterator[Batch]:
    """Cut a batch into `count` parts of equally many pictures; what is over is left out."""
    size = len(batch.images) // count
    for index in range(count):
        part = slice(index * size, (index + 1) * size)
        yield Batch(images=batch.images[part], targets=batch.targets[part])


def _prepare(detector: Detector, schedule: ScheduleConfig) -> None:
    if schedule.channels_last:
        detector.to(memory_format=torch.channels_last)
    if schedule.compile:
        # A measured step goes backward through the trunk more than once, which freed buffers forbid.
        torch._functorch.config.donated_buffer = False
        detector.compile_trunk()


def _named(parts: dict[str, float], norms: dict[str, float], length: float, rate: float) -> dict[str, float]:
    values = {"loss/total": math.fsum(parts.values())} | {f"loss/{name}": value for name, value in parts.items()}
    values |= {"learning_rate": rate} | ({"gradient_norm": length} if math.isfinite(length) else {})
    whole = sum(norms.values())
    if 0 < whole < math.inf:
        values |= {f"gradient_share/{name}": norm / whole for name, norm in norms.items()}
    return values
