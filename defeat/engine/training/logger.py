"""A run's progress, and the metrics that it logs."""

from dataclasses import dataclass, field
from typing import Any

from defeat.engine.events import Subject
from defeat.engine.report import Reporter, Stopwatch


@dataclass(kw_only=True)
class Progress:
    """How much of the whole run is done, in units of one image trained on (see `context`).

    Attributes:
        total: the work of the whole run.
        done: the work up to now.
        rate: the smoothed rate, units per second; 0 before the first measurement.
    """

    total: float
    done: float = 0.0
    rate: float = 0.0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def advance(self, units: float) -> None:
        """Count work that was just done, and update the rate."""
        self.done += units
        self.rate = self.stopwatch.lap(units)

    def skip(self, units: float) -> None:
        """Count work that will not be done: the remaining fraction is then right after a resume, too."""
        self.done += units

    @property
    def fraction(self) -> float:
        """Share of the whole run that is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None before anything was timed."""
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass(kw_only=True)
class MeanMetrics:
    """Means of named values over the steps since metrics were last logged."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Add one step's values; a step need not have all of them."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.steps[name] = self.steps.get(name, 0) + 1

    def flush(self) -> dict[str, float]:
        """Return the means, and start over."""
        means = {name: value / self.steps[name] for name, value in self.sums.items()}
        self.sums, self.steps = {}, {}
        return means


@dataclass(kw_only=True)
class MetricsLogger:
    """Logs metrics and evaluations as events, and keeps them for `metrics.json` and the training checkpoint."""

    reporter: Reporter
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def log_metrics(self, subject: Subject, *, step: int, epoch: float, values: dict[str, float]) -> None:
        """Log the values of one optimiser step."""
        self.reporter.metrics(subject, step=step, epoch=epoch, values=values)
        self.metrics.append({"subject": subject, "step": step, "epoch": round(epoch, 4), "values": values})

    def log_evaluation(self, subject: Subject, *, epoch: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of one evaluation."""
        self.reporter.evaluation(subject, epoch=epoch, metrics=metrics)
        self.evaluations.append({"subject": subject, "epoch": epoch, "metrics": metrics})

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return all that was logged, as `metrics.json` and the training checkpoint hold it."""
        return {"metrics": list(self.metrics), "evaluations": list(self.evaluations)}

    def load_state_dict(self, state: dict[str, list[dict[str, Any]]]) -> None:
        """Restore what `state_dict` returned; nothing is reported again."""
        self.metrics, self.evaluations = state["metrics"], state["evaluations"]
