"""What a run tells about itself while it trains: how far it is, and what it measured."""

from dataclasses import dataclass, field
from typing import Any

from defeat.engine.report import Reporter, Stopwatch, Subject


@dataclass(kw_only=True)
class Plan:
    """How much of the whole run is done, in images trained on."""

    total: float
    done: float = 0.0
    rate: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)

    def advance(self, images: float) -> None:
        """Count work and update the rate."""
        self.done += images
        self.rate = self.watch.lap(images)

    def skip(self, images: float) -> None:
        """Count work that will not be done: what is left is then right after a resume, too."""
        self.done += images

    @property
    def fraction(self) -> float:
        """Share of the whole run that is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None before anything was timed."""
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass(kw_only=True)
class Running:
    """The values of the steps since metrics were last logged: their means are what is logged."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Count one step's values; a step need not have all of them."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.steps[name] = self.steps.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Return the means and begin anew."""
        means = {name: value / self.steps[name] for name, value in self.sums.items()}
        self.sums, self.steps = {}, {}
        return means


@dataclass(kw_only=True)
class History:
    """What was logged, to the reporter and for `metrics.json`."""

    reporter: Reporter
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def log_metrics(self, subject: Subject, *, step: int, epoch: float, values: dict[str, float]) -> None:
        """Log the values of one step."""
        self.reporter.metrics(subject, step=step, epoch=epoch, values=values)
        self.metrics.append({"subject": subject, "step": step, "epoch": round(epoch, 4), "values": values})

    def log_evaluation(self, subject: Subject, *, epoch: int, metrics: dict[str, Any]) -> None:
        """Log one evaluation."""
        self.reporter.evaluation(subject, epoch=epoch, metrics=metrics)
        self.evaluations.append({"subject": subject, "epoch": epoch, "metrics": metrics})

    def state(self) -> dict[str, list[dict[str, Any]]]:
        """Return both lists, as `metrics.json` and the training checkpoint hold them."""
        return {"metrics": list(self.metrics), "evaluations": list(self.evaluations)}
