"""Whether training does what was asked for: parts of the loss that do nothing, and memory."""

import resource

import torch

from defeat.engine.report import Reporter, Subject

# A measured step costs part of a backward pass for each part of the loss: 1 to 2 % of the time at this distance.
MEASURE_EVERY = 50
QUIET_STEPS = 50  # steps that a part of the loss may be 0 before somebody is told


class Watch:
    """Warns once when a part of the loss has been 0, or the gradient not finite, for many steps.

    A part that is not finite ends the run at once, and so does such a gradient, except in float16.

    Attributes:
        quiet_steps: for each part, how many steps up to now it has been 0; for `gradient_norm`, how many had none.
    """

    def __init__(self, reporter: Reporter, subject: Subject, quiet_steps: dict[str, int]) -> None:
        self._reporter = reporter
        self._subject = subject
        self.quiet_steps = quiet_steps

    def look(self, values: dict[str, float], *, step: int) -> None:
        """Take in the values of step `step`."""
        for name, value in values.items():
            if name.startswith("loss/") and self._long(name, quiet=value == 0.0):
                self._reporter.message(
                    "warn",
                    "loss_part_zero",
                    f"{name} of the {self._subject} has been 0 for {QUIET_STEPS} steps, up to step {step}: this part "
                    "teaches nothing; look at what it is made from, or at its weight",
                )
        if self._long("gradient_norm", quiet="gradient_norm" not in values):
            self._reporter.message(
                "warn",
                "gradient_not_finite",
                f"the {self._subject}'s gradient has overflowed float16 for {QUIET_STEPS} steps, up to step {step}: "
                "all of them were left out; take precision bfloat16 or float32, or lower the learning_rate",
            )

    def _long(self, name: str, *, quiet: bool) -> bool:
        """Count a step, and return whether it is the one to warn at."""
        steps = self.quiet_steps[name] = self.quiet_steps.get(name, 0) + 1 if quiet else 0
        return steps == QUIET_STEPS


def forget_memory_peak(device: torch.device) -> None:
    """Let `memory_bytes` begin anew, on a GPU: a student's peak is not its teacher's. The kernel's stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_bytes(device: torch.device) -> int:
    """Return the most memory that was in use up to now: torch's on a GPU, else the whole process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
