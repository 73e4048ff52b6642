"""Shows a job's progress: a line for each event, and on a terminal a progress bar below them."""

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from defeat.cli.console import Output, ap, percent, queued, safe, seconds
from defeat.client.types import Evaluation, Job, Metrics, Update

_LINE_EVERY_S = 30.0
_STYLES = {"info": "", "warn": "yellow", "error": "red"}


class JobView:
    """Shows the updates of one job. As a context manager it removes the progress bar at its end."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._status: str | None = None
        self._place: tuple[Any, ...] | None = None
        self._last_line = 0.0
        self._ahead: int | None = None
        self._losses: dict[str, float | None] = {}
        self._bar: Progress | None = None
        if out.console.is_terminal and not out.as_json:
            self._bar = Progress(
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TextColumn("{task.description}", markup=False),
                console=out.console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, update: Update) -> None:
        """Print what is new."""
        job = update["job"]
        if job["status"] != self._status:
            self._status = job["status"]
            self._out.line(job["id"], job["status"])
        if (queue := job["queue"]) is not None and queue["jobs_ahead"] != self._ahead:
            self._ahead = queue["jobs_ahead"]
            self._out.line(queued(queue))
        for event in update["events"]:
            self._out.line(
                f"{event['level']}: {event['message']} ({event['code']})", style=_STYLES.get(event["level"], "")
            )
        self._losses = _newest_losses(update["metrics"]) or self._losses
        for evaluation in update["evaluations"]:
            self._out.line(_evaluation_line(evaluation))
        self._show_progress(job)

    def _show_progress(self, job: Job) -> None:
        progress = job["progress"]
        if progress is None:
            return
        line = _progress_line(job, self._losses)
        if self._bar:
            self._bar.update(self._task, completed=progress["fraction"] or 0.0, description=safe(line).plain)
            return
        place = (progress["phase"], progress["epoch"])
        if place != self._place or time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._place, self._last_line = place, time.monotonic()
            self._out.line(f"{percent(progress['fraction'])} {line}")


def show_results(out: Output, job: Job) -> None:
    """Print the results: the accuracies of teacher and student."""
    results = job["results"] or {}
    rows = []
    for subject in ("teacher", "student"):
        metrics = results.get(subject) or {}
        for name, numbers in ((subject, metrics), (f"{subject}'s masks", metrics.get("masks"))):
            if numbers:
                rows.append((name, *(ap(numbers.get(value)) for value in ("ap", "ap50", "ap75"))))
    if rows:
        out.table(["", "AP", "AP50", "AP75"], rows)
    if checkpoint := results.get("teacher_checkpoint_id"):
        out.line(f"the teacher is saved as {checkpoint}")


def _newest_losses(metrics: Iterable[Metrics]) -> dict[str, float | None]:
    values = next((row["values"] for row in reversed(list(metrics))), {})
    return {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss")}


def _progress_line(job: Job, losses: dict[str, float | None]) -> str:
    progress = job["progress"]
    assert progress is not None
    parts = [progress["phase"]]
    if progress["epoch"] is not None:
        parts.append(f"epoch {progress['epoch']}/{progress['epochs'] or '?'}")
    if progress["step"] is not None and progress["steps"]:
        parts.append(f"step {progress['step']}/{progress['steps']}")
    if losses:
        parts.append("loss " + " ".join(f"{name} {_number(value)}" for name, value in losses.items()))
    if progress["images_per_s"] is not None:
        parts.append(f"{progress['images_per_s']:.1f} images/s")
    if progress["eta_s"] is not None:
        parts.append(f"ETA {seconds(progress['eta_s'])}")
    return ", ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _evaluation_line(evaluation: Evaluation) -> str:
    metrics = evaluation["metrics"]
    return (
        f"{evaluation['subject']} after epoch {evaluation['epoch']}: AP {ap(metrics.get('ap'))}, "
        f"AP50 {ap(metrics.get('ap50'))}"
    )
