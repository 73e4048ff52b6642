"""What to do about a batch that does not fit into memory: the largest part of it that does, found by trying."""

import torch
from torch import nn
from torch.optim import Optimizer

from defeat.engine.data.loading.batch import Batch
from defeat.engine.detectors.base import Detector
from defeat.engine.methods.base import StepInfo
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.optim import state_bytes


class BatchSizeSearch:
    """Searches the largest part of a batch that a training step has memory for.

    Args:
        detector: the detector in training, on the device.
        losses: the step's forward half (`step.Losses`), not wrapped for several processes.
        optimizer: the optimiser over what is trained.
        schedule: the detector's schedule.
        device: where it is trained.
        single: whether one process trains alone. One of several does not search: the others would not take part in
            what a training pass exchanges.
    """

    def __init__(
        self,
        detector: Detector,
        losses: nn.Module,
        *,
        optimizer: Optimizer,
        schedule: ScheduleConfig,
        device: torch.device,
        single: bool,
    ) -> None:
        self._detector = detector
        self._losses = losses
        self._optimizer = optimizer
        self._schedule = schedule
        self._device = device
        self._single = single

    def error(self, message: str, batch: Batch, step_info: StepInfo) -> RunError:
        """Return the error for a batch that failed with torch's `message`, with advice if this process is alone.

        Call it outside the handler of torch's error: the error's traceback holds the failed pass, and so its memory.
        """
        advice = f"; {self._advice(batch, step_info)}" if self._single else ""
        images = len(batch) // self._schedule.accumulation
        first_line = message.split("\n", 1)[0][:300]
        return RunError(
            "oom", "out_of_memory", f"{images} images at a time do not fit into memory{advice} ({first_line})"
        )

    def _advice(self, batch: Batch, step_info: StepInfo) -> str:
        """Return which sizes would fit: divisors of the present one, the largest first."""
        images, least = len(batch) // self._schedule.accumulation, self._detector.least_images
        for size in range(images - 1, least - 1, -1):
            if images % size == 0 and self._fits(next(batch.split(len(batch) // size)), step_info):
                batch_size = self._schedule.batch_size
                return (
                    f"{size} at a time fit: that is accumulation {batch_size // size} for the same batch_size "
                    f"{batch_size}, or batch_size {size * self._schedule.accumulation}"
                )
        few = "one image fits" if least == 1 else f"{least} images fit"
        return f"not even {few}: lower the detector's min_size and max_size, or use a smaller detector"

    def _fits(self, part: Batch, step_info: StepInfo) -> bool:
        try:
            self._attempt(part, step_info)
        except torch.OutOfMemoryError:
            return False
        return True

    def _attempt(self, part: Batch, step_info: StepInfo) -> None:
        """Run forward and backward, with the optimiser's state of its first step reserved; update nothing."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        reserved = torch.empty(state_bytes(self._optimizer), dtype=torch.uint8, device=self._device)
        losses, _ = self._losses(part, step_info, False)
        torch.stack(list(losses.values())).sum().backward()
        del reserved
