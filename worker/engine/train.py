"""The training loop: one detector, one method, one schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from worker.data.canonical import CanonicalDataset
from worker.data.loader import Batch, PictureReader, TrainingBatches
from worker.data.resize import InputSize
from worker.detectors.base import Detector
from worker.engine.checkpoint import Best, TrainingState
from worker.engine.config import AugmentationConfig, EvaluationConfig, ScheduleConfig
from worker.engine.evaluate import coco_metrics, detect_split, to_float
from worker.engine.optim import build_optimizer, learning_rate
from worker.engine.seeds import reseed, seed_for
from worker.methods.base import Clock, Method
from worker.report import Reporter, RunError, Stopwatch, Subject

LOG_EVERY = 10  # optimiser steps between two metrics events
# A picture evaluated costs about this much of one trained on; only the progress bar depends on it.
EVALUATION_COST = 0.35
# And a frozen teacher's forward pass about this share of a student's step; likewise.
TEACHER_COST = 0.3


@dataclass(kw_only=True)
class Plan:
    """How much of the whole run is done, in pictures trained on."""

    total: float
    done: float = 0.0
    rate: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)

    def advance(self, pictures: float) -> None:
        """Count work and update the rate."""
        self.done += pictures
        self.rate = self.watch.lap(pictures)

    @property
    def fraction(self) -> float:
        """Share of the whole run that is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None before anything was timed."""
        return (self.total - self.done) / self.rate if self.rate else None


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


@dataclass(kw_only=True)
class Context:
    """What both trainings of a run share."""

    dataset: CanonicalDataset
    train_pictures: PictureReader
    eval_pictures: PictureReader
    evaluation: EvaluationConfig
    augmentation: AugmentationConfig
    seed: int
    device: torch.device
    reporter: Reporter
    history: History
    plan: Plan


def train_step(
    student: Detector,
    teacher: Detector | None,
    method: Method,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    clock: Clock,
    gradient_clip: float,
    device: torch.device,
) -> dict[str, float]:
    """Take one optimiser step and return each part of the loss, their sum, and the gradient's norm before clipping.

    Raises:
        RunError: `loss_not_finite`, naming the parts; the weights are as they were before the step.
    """
    images = [to_float(image, device) for image in batch.images]
    targets = batch.targets_on(device)
    passed = student.train_pass(images, targets)
    losses: dict[str, Tensor] = {**passed.losses, **method(passed, teacher, clock)}
    parts = torch.stack([loss.float() for loss in losses.values()])
    total = parts.sum()
    # All numbers in one copy: each copy of its own would wait for the device.
    *numbers, whole = torch.cat([parts.detach(), total.detach()[None]]).tolist()
    values = {f"loss/{name.removeprefix('loss_')}": value for name, value in zip(losses, numbers, strict=True)}
    if not math.isfinite(whole):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise RunError(
            "user", "loss_not_finite", f"the loss is not finite at step {clock.step} ({shown}); lower the learning_rate"
        )
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip or math.inf)
    optimizer.step()
    return {"loss/total": whole, **values, "gradient_norm": norm.item()}


def evaluate(context: Context, detector: Detector, *, subject: Subject, epoch: int) -> dict[str, Any]:
    """Measure a detector on the evaluation split, log it and return the metrics."""

    def _on_batch(pictures: int) -> None:
        context.reporter.check_cancelled()
        context.plan.advance(pictures * EVALUATION_COST)
        context.reporter.progress("evaluation", fraction=context.plan.fraction, epoch=epoch, eta_s=context.plan.eta_s)

    found = detect_split(
        detector,
        context.eval_pictures,
        batch_size=context.evaluation.batch_size,
        device=context.device,
        on_batch=_on_batch,
    )
    metrics = coco_metrics(context.dataset, context.evaluation.split, found)
    context.history.log_evaluation(subject, epoch=epoch, metrics=metrics)
    return metrics


def train(
    context: Context,
    detector: Detector,
    *,
    subject: Subject,
    teacher: Detector | None,
    method: Method,
    schedule: ScheduleConfig,
    resume: TrainingState | None,
    save: Callable[[TrainingState], None],
) -> Best:
    """Train `detector`, evaluate it every so many epochs, and return the best; `detector` ends as the last one.

    Args:
        context: what the run's trainings share.
        detector: who is trained, on the device.
        subject: what it is called in events.
        teacher: frozen, in eval mode, on the device; None where the method needs none.
        method: adds its losses to the detector's own; its parameters are trained along.
        schedule: epochs, batch size, optimiser.
        resume: a state of this training to go on from.
        save: called with the state after each epoch but the last.

    Raises:
        RunError: `loss_not_finite`, and what `TrainingBatches` raises.
        Cancelled: the run was asked to end; the last epoch's checkpoint stands.
    """
    optimizer = build_optimizer([*detector.parameters(), *method.parameters()], schedule)
    best, first_epoch = None, 0
    if resume is not None:
        detector.load_state_dict(resume.model)
        method.load_state_dict(resume.method)
        optimizer.load_state_dict(resume.optimizer)
        best, first_epoch = resume.best, resume.epoch
    batches = TrainingBatches(
        context.train_pictures,
        batch_size=schedule.batch_size,
        size=InputSize.taken_from(detector),
        augmentation=context.augmentation,
        device=context.device,
    )
    for epoch in range(first_epoch, schedule.epochs):
        _train_epoch(context, detector, subject, teacher, method, schedule, optimizer, batches, epoch)
        done = epoch + 1
        if done % context.evaluation.every_epochs == 0 or done == schedule.epochs:
            metrics = evaluate(context, detector, subject=subject, epoch=done)
            if best is None or (metrics["ap"] or 0.0) > (best.metrics["ap"] or 0.0):
                model = {name: tensor.detach().clone() for name, tensor in detector.state_dict().items()}
                best = Best(epoch=done, metrics=metrics, model=model)
        if done < schedule.epochs:
            state = TrainingState(
                subject=subject,
                epoch=done,
                model=detector.state_dict(),
                method=method.state_dict(),
                optimizer=optimizer.state_dict(),
                best=best,
                teacher=None,
                teacher_metrics=None,
                done=context.plan.done,
                history=context.history.state(),
            )
            save(state)
    assert best is not None, "the last epoch is always evaluated"
    return best


def _train_epoch(
    context: Context,
    detector: Detector,
    subject: Subject,
    teacher: Detector | None,
    method: Method,
    schedule: ScheduleConfig,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    epoch: int,
) -> None:
    reseed(context.seed, subject, "epoch", epoch)
    steps = len(batches)
    detector.train()
    method.train()
    watch, images_per_s = Stopwatch(), 0.0
    sums: dict[str, float] = {}
    counted = 0
    for index, batch in enumerate(batches.epoch(seed_for(context.seed, subject, "order", epoch))):
        context.reporter.check_cancelled()
        step = epoch * steps + index
        rate = learning_rate(schedule, step=step, steps_per_epoch=steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        values = train_step(
            detector,
            teacher,
            method,
            batch,
            optimizer,
            clock=Clock(step=step, steps=steps * schedule.epochs, epoch=epoch, epochs=schedule.epochs),
            gradient_clip=schedule.gradient_clip,
            device=context.device,
        )
        images_per_s = watch.lap(len(batch.images))
        context.plan.advance(len(batch.images) * (1.0 if teacher is None else 1.0 + TEACHER_COST))
        counted += 1
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        if (step + 1) % LOG_EVERY == 0 or index == steps - 1:
            means = {name: value / counted for name, value in sums.items()}
            means |= {"learning_rate": rate, "images_per_s": images_per_s}
            context.history.log_metrics(subject, step=step + 1, epoch=(step + 1) / steps, values=means)
            sums, counted = {}, 0
        context.reporter.progress(
            "teacher" if subject == "teacher" else "distillation",
            fraction=context.plan.fraction,
            epoch=epoch + 1,
            epochs=schedule.epochs,
            step=step + 1,
            steps=steps * schedule.epochs,
            eta_s=context.plan.eta_s,
            images_per_s=images_per_s,
        )
