"""Warnings about a training that runs but not as intended, and how much memory it takes."""

import resource

import torch

from defeat.engine.data.loading.loader import TrainingBatches
from defeat.engine.detectors.base import Detector
from defeat.engine.events import Subject
from defeat.engine.report import Reporter
from defeat.engine.training.config import ScheduleConfig

QUIET_STEPS = 50  # consecutive steps after which a loss of 0, or a missing gradient, is reported


class Monitor:
    """Warns once when a part of the loss has been 0, or the gradient not finite, for `QUIET_STEPS` steps in a row.

    A loss that is not finite ends the run at once, and so does such a gradient, except in float16 (see `step`).

    Attributes:
        quiet_steps: for each part of the loss, the number of steps in a row up to now in which it was 0; for
            `gradient_norm`, those in which it was not finite.
    """

    def __init__(self, reporter: Reporter, subject: Subject) -> None:
        self._reporter = reporter
        self._subject = subject
        self.quiet_steps: dict[str, int] = {}

    def update(self, values: dict[str, float], *, step: int) -> None:
        """Count the values of step `step`, and warn if it is time to."""
        for name, value in values.items():
            if name.startswith("loss/") and self._reaches_limit(name, quiet=value == 0.0):
                self._reporter.message(
                    "warn",
                    "loss_part_zero",
                    f"{name} of the {self._subject} has been 0 for {QUIET_STEPS} steps, up to step {step}: this part "
                    "of the loss has no effect; check what it is computed from, and its weight",
                )
        if self._reaches_limit("gradient_norm", quiet="gradient_norm" not in values):
            self._reporter.message(
                "warn",
                "gradient_not_finite",
                f"the {self._subject}'s gradient has overflowed float16 for {QUIET_STEPS} steps, up to step {step}: "
                "all of them were skipped; use precision bfloat16 or float32, or lower the learning_rate",
            )

    def _reaches_limit(self, name: str, *, quiet: bool) -> bool:
        """Count a step, and return whether it is the one to warn at."""
        steps = self.quiet_steps[name] = self.quiet_steps.get(name, 0) + 1 if quiet else 0
        return steps == QUIET_STEPS


def warn_of_long_warmups(
    reporter: Reporter, subject: Subject, schedule: ScheduleConfig, *, method_warmup: int, steps: int
) -> None:
    """Warn if the learning rate or the distillation warms up over more than the `steps` of the whole training."""
    warmups = {
        "learning rate": 0 if schedule.decay == "one_cycle" else schedule.warmup_steps,
        "distillation": method_warmup,
    }
    for name, warmup in warmups.items():
        if warmup > steps:
            reporter.message(
                "warn",
                "warmup_longer_than_training",
                f"the {subject}'s {name} warms up over {warmup} steps, and the whole training has {steps}: it never "
                f"reaches its full value; lower the warmup_steps of the {name}",
            )


def warn_of_little_prefetching(reporter: Reporter, batches: TrainingBatches) -> None:
    """Warn if free memory allows less prefetching than the machine's processors do."""
    actual, wanted = batches.prefetch, batches.wanted_prefetch
    if actual == wanted:
        return
    reporter.message(
        "warn",
        "little_memory_for_loading",
        f"{wanted.processes} processes would prefetch batches, and need {wanted.slots * batches.batch_bytes / 1e6:.3g} "
        f"MB for them; this machine's free memory allows {actual.processes}, {actual.batches} batches each: the GPU "
        "may wait for images; give the worker more memory",
    )


class CompilationMonitor:
    """Warns once of each detector whose trunk torch.compile could not compile; that shows at its first calls."""

    def __init__(self, reporter: Reporter, detectors: dict[Subject, Detector]) -> None:
        self._reporter = reporter
        self._detectors = dict(detectors)

    def update(self) -> None:
        """Warn of detectors that were found to run without compilation since the last call."""
        for subject, detector in list(self._detectors.items()):
            if detector.compilation_failure:
                del self._detectors[subject]
                self._reporter.message(
                    "warn",
                    "not_compiled",
                    f"the {subject}'s trunk runs without torch.compile: {detector.compilation_failure}",
                )


def reset_memory_peak(device: torch.device) -> None:
    """Restart `memory_bytes` on a GPU, so that the student's peak is not its teacher's; on a CPU it cannot restart."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory up to now, bytes: what torch allocated on a GPU, or else the whole process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
