"""The training loop: one detector, one method, one schedule."""

import time
from collections.abc import Callable

from defeat.engine.data.loading.loader import TrainingBatches
from defeat.engine.data.loading.resize import InputSize, disable_training_resize
from defeat.engine.detectors.base import Detector
from defeat.engine.events import Subject
from defeat.engine.methods.balance import is_measured
from defeat.engine.methods.base import Method, StepInfo
from defeat.engine.numerics import numerics
from defeat.engine.report import Cancelled, Stopwatch
from defeat.engine.training.checkpoint import Best, TrainingCheckpoint
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.context import EVALUATION_COST, RunContext, image_cost
from defeat.engine.training.early_stopping import EarlyStopping
from defeat.engine.training.ema import EMA
from defeat.engine.training.health import (
    CompilationMonitor,
    Monitor,
    memory_bytes,
    reset_memory_peak,
    warn_of_little_prefetching,
    warn_of_long_warmups,
)
from defeat.engine.training.inspection import Inspection
from defeat.engine.training.seeds import reseed, seed_for
from defeat.engine.training.state import TrainState
from defeat.engine.training.step import Step, StepResult

LOG_EVERY = 10  # optimiser steps between two metrics events


class Trainer:
    """Trains a detector and evaluates it every so many epochs; it ends as after the last epoch. Used once.

    Args:
        context: what the run's trainings share.
        detector: the detector to train, on the device.
        subject: its name in events.
        teacher: frozen, in eval mode, on the device; None where the method needs none.
        method: adds its losses to the detector's own; its parameters are trained as well.
        schedule: epochs, batch size, optimiser.
        save: called with a checkpoint after each epoch but the last, every `checkpoint_minutes` in between, and when
            the run is asked to end.
    """

    def __init__(
        self,
        context: RunContext,
        detector: Detector,
        *,
        subject: Subject,
        teacher: Detector | None,
        method: Method,
        schedule: ScheduleConfig,
        save: Callable[[TrainingCheckpoint], None],
    ) -> None:
        self.context = context
        self.subject: Subject = subject
        self.schedule = schedule
        self._save_checkpoint = save
        self._image_cost = image_cost(with_teacher=teacher is not None)
        if schedule.frozen_stages:
            detector.freeze_stages(schedule.frozen_stages)
        if schedule.frozen_statistics:
            detector.freeze_statistics()
        self._step = Step(
            detector, method=method, teacher=teacher, schedule=schedule, group=context.group, device=context.device
        )
        self._batches = _batches(context, detector, schedule)
        self._inspection = Inspection(self._batches)
        self._state = TrainState(
            detector=detector,
            method=method,
            optimizer=self._step.optimizer,
            scaler=self._step.scaler,
            ema=EMA(detector, decay=schedule.ema_decay) if schedule.ema_decay else None,
            monitor=Monitor(context.reporter, subject),
        )
        compiled: dict[Subject, Detector] = {subject: detector} if schedule.compile else {}
        if teacher is not None and schedule.compile:
            compiled["teacher"] = teacher
        self._compilation = CompilationMonitor(context.reporter, compiled)
        self._early_stopping = EarlyStopping(
            patience=schedule.patience, every_epochs=context.evaluation.every_epochs, epochs=schedule.epochs
        )
        self._saved_at = time.monotonic()
        reset_memory_peak(context.device)

    def run(self, resume: TrainingCheckpoint | None) -> Best:
        """Train to the end, from the beginning or from a checkpoint of this training, and return the best detector.

        Raises:
            RunError: `loss_not_finite`, `out_of_memory`.
            Cancelled: the run was asked to end; a checkpoint of the last completed step is saved.
        """
        context, schedule, state = self.context, self.schedule, self._state
        first, start = (resume.epoch, resume.step) if resume else (0, 0)
        if resume:
            state.load(resume)
        else:
            steps, warmup = schedule.epochs * len(self._batches), state.method.warmup_steps
            warn_of_long_warmups(context.reporter, self.subject, schedule, method_warmup=warmup, steps=steps)
        warn_of_little_prefetching(context.reporter, self._batches)
        for epoch in range(first, schedule.epochs):
            with numerics(context.device, schedule.precision, shapes=self._batches.padded_shapes):
                self._train_epoch(epoch, start)
            start, completed = 0, epoch + 1
            if completed % context.evaluation.every_epochs == 0 or completed == schedule.epochs:
                self._evaluate(completed)
            if self._stops_early(completed):
                break
            if completed < schedule.epochs:
                self._save(completed, 0)
        assert state.best is not None, "the last epoch is always evaluated"
        if state.ema:
            state.detector.load_state_dict(state.ema.tensors)
        return state.best

    def _train_epoch(self, epoch: int, start: int) -> None:
        """Train epoch `epoch` (from 0), from its step `start` on."""
        context, schedule, state = self.context, self.schedule, self._state
        steps = len(self._batches)
        batches = self._batches.epoch(seed_for(context.seed, self.subject, "order", epoch), start=start)
        state.detector.train()
        state.method.train()
        # Reported before the first step, so that a failure in it is attributed to this phase.
        self._report(epoch * steps + start, epoch, images_per_s=None)
        self._inspection.start_epoch()
        stopwatch, requested_at = Stopwatch(), time.monotonic()
        for index, loaded in enumerate(batches, start):
            waited = time.monotonic() - requested_at
            step = epoch * steps + index
            batch = loaded.to(context.device)
            self._inspection.check(batch, index)
            # Each process draws for its own images.
            reseed(context.seed, self.subject, "step", step, context.group.rank)
            result = self._step(
                batch,
                StepInfo(step=step, steps=steps * schedule.epochs, epoch=epoch, epochs=schedule.epochs),
                measured=is_measured(step),
                cancelled=context.reporter.cancelled,
            )
            if state.ema:
                state.ema.update(state.detector, step=step)
            self._count(result, step, data_wait=waited / (time.monotonic() - requested_at))
            images_per_s = stopwatch.lap(schedule.batch_size)
            if (step + 1) % LOG_EVERY == 0 or index == steps - 1:
                self._log(step + 1, images_per_s=images_per_s)
            self._report(step + 1, epoch, images_per_s=images_per_s)
            if result.cancelled:
                self._save(epoch, index + 1)
                raise Cancelled
            if time.monotonic() - self._saved_at > 60 * schedule.checkpoint_minutes:
                self._save(epoch, index + 1)
            requested_at = time.monotonic()

    def _count(self, result: StepResult, step: int, *, data_wait: float) -> None:
        """Count a step's values; `data_wait` is the share of its time that it waited for its batch."""
        self._state.monitor.update(result.values, step=step)
        self._state.metrics.add({**result.values, "data_wait": data_wait})
        self._compilation.update()
        self.context.progress.advance(self.schedule.batch_size * self._image_cost)

    def _log(self, step: int, *, images_per_s: float) -> None:
        """Log the means since the last call, after `step` steps."""
        means = self._state.metrics.flush()
        means |= {"images_per_s": images_per_s, "memory_bytes": memory_bytes(self.context.device)}
        self.context.logger.log_metrics(self.subject, step=step, epoch=step / len(self._batches), values=means)

    def _report(self, step: int, epoch: int, *, images_per_s: float | None) -> None:
        """Report progress after `step` steps, in epoch `epoch` (from 0)."""
        progress = self.context.progress
        self.context.reporter.progress(
            "teacher" if self.subject == "teacher" else "distillation",
            fraction=progress.fraction,
            epoch=epoch + 1,
            epochs=self.schedule.epochs,
            step=step,
            steps=len(self._batches) * self.schedule.epochs,
            eta_s=progress.eta_s,
            images_per_s=images_per_s,
        )

    def _evaluate(self, completed: int) -> None:
        """Evaluate after `completed` epochs, and keep the detector if it is the best one so far."""
        context, state = self.context, self._state
        before = context.progress.done
        context.group.agree(state.synchronised_tensors())
        try:
            with state.evaluated():
                metrics = context.evaluate(state.detector, subject=self.subject, epoch=completed)
        except Cancelled:
            context.progress.done = before
            self._save(completed - 1, len(self._batches))
            raise
        state.keep_best(epoch=completed, metrics=metrics)

    def _stops_early(self, completed: int) -> bool:
        """Return whether training ends after `completed` epochs; if so, report it and skip the rest of the work."""
        context, best, early_stopping = self.context, self._state.best, self._early_stopping
        if best is None or not early_stopping.stops(completed=completed, best=best.epoch):
            return False
        without = early_stopping.without_improvement(completed=completed, best=best.epoch)
        context.reporter.message(
            "info",
            "stopped_early",
            f"no better AP of the {self.subject} in {without} evaluations: ended at epoch {completed}",
        )
        epochs, evaluations = self.schedule.epochs - completed, early_stopping.evaluations_after(completed)
        context.progress.skip(epochs * len(context.train_images) * self._image_cost)
        context.progress.skip(evaluations * len(context.eval_images) * EVALUATION_COST)
        return True

    def _save(self, epoch: int, step: int) -> None:
        """Save a checkpoint after `epoch` epochs and `step` steps of the next one."""
        self._saved_at = time.monotonic()
        if self.context.group.is_main:
            self._save_checkpoint(
                TrainingCheckpoint(
                    subject=self.subject,
                    epoch=epoch,
                    step=step,
                    done=self.context.progress.done,
                    history=self.context.logger.state_dict(),
                    **self._state.state_dict(),
                )
            )


def _batches(context: RunContext, detector: Detector, schedule: ScheduleConfig) -> TrainingBatches:
    """Return the training batches, at the detector's input size; its own transform resizes no more in training."""
    disable_training_resize(detector)
    return TrainingBatches(
        context.train_images,
        batch_size=schedule.batch_size,
        size=InputSize.from_detector(detector),
        augmentation=context.augmentation,
        device=context.device,
        masks=detector.trains_masks,
        cache_bytes=context.image_memory_bytes,
        rank=context.group.rank,
        world_size=context.group.size,
    )
