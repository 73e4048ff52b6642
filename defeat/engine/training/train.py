"""The training loop: one detector, one method, one schedule."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defeat.engine.data.canonical import CanonicalDataset
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.loader import ImageReader, TrainingBatches
from defeat.engine.data.loading.resize import InputSize
from defeat.engine.detectors.base import Detector
from defeat.engine.evaluation.config import EvaluationConfig
from defeat.engine.evaluation.evaluate import coco_metrics, detect_split
from defeat.engine.methods.base import Method, StepInfo
from defeat.engine.numerics import numerics
from defeat.engine.report import Cancelled, Reporter, Stopwatch, Subject
from defeat.engine.training import inspection
from defeat.engine.training.checkpoint import Best, TrainingState
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.ema import Average
from defeat.engine.training.health import MEASURE_EVERY, Watch, forget_memory_peak, memory_bytes
from defeat.engine.training.inspection import Look
from defeat.engine.training.logger import History, Plan, Running
from defeat.engine.training.optim import restore
from defeat.engine.training.process_group import ProcessGroup
from defeat.engine.training.seeds import reseed, seed_for
from defeat.engine.training.step import Step

LOG_EVERY = 10  # optimiser steps between two metrics events
# An image evaluated costs about this much of one trained on; only the progress bar depends on it.
EVALUATION_COST = 0.35
# And a frozen teacher's forward pass about this share of a student's step; likewise.
TEACHER_COST = 0.3


@dataclass(kw_only=True)
class Context:
    """What both trainings of a run share."""

    dataset: CanonicalDataset
    train_images: ImageReader
    eval_images: ImageReader
    evaluation: EvaluationConfig
    augmentation: AugmentationConfig
    seed: int
    device: torch.device
    reporter: Reporter
    history: History
    plan: Plan
    group: ProcessGroup
    image_memory_bytes: int | None


def evaluate(context: Context, detector: Detector, *, subject: Subject, epoch: int) -> dict[str, Any]:
    """Measure a detector on the evaluation split, log it and return the metrics. Each process does its share."""

    reporter, group = context.reporter, context.group

    def _on_batch(images: int) -> None:
        if group.is_single:  # one of several that stopped by itself would leave the others waiting
            reporter.check_cancelled()
        context.plan.advance(images * group.size * EVALUATION_COST)
        reporter.progress("evaluation", fraction=context.plan.fraction, epoch=epoch, eta_s=context.plan.eta_s)

    # Said before it begins, so that what goes wrong in its first batch is known to be its own.
    reporter.progress("evaluation", fraction=context.plan.fraction, epoch=epoch, eta_s=context.plan.eta_s)
    found = detect_split(
        detector,
        context.eval_images,
        batch_size=context.evaluation.batch_size,
        device=context.device,
        on_batch=_on_batch,
        rank=group.rank,
        world_size=group.size,
    )
    shares = group.gather((found, reporter.cancelled))
    if any(cancelled for _, cancelled in shares):
        raise Cancelled
    together = {key: value for share, _ in shares for key, value in share.items()}
    metrics = coco_metrics(context.dataset, context.evaluation.split, together)
    context.history.log_evaluation(subject, epoch=epoch, metrics=metrics)
    return metrics


class Training:
    """Trains `detector`, evaluates it every so many epochs; `detector` ends as the last one. Used once.

    Args:
        context: what the run's trainings share.
        detector: who is trained, on the device.
        subject: what it is called in events.
        teacher: frozen, in eval mode, on the device; None where the method needs none.
        method: adds its losses to the detector's own; its parameters are trained along.
        schedule: epochs, batch size, optimiser.
        save: called with the state after each epoch but the last, every `checkpoint_minutes` between, and when the run
            is asked to end.
    """

    def __init__(
        self,
        context: Context,
        detector: Detector,
        *,
        subject: Subject,
        teacher: Detector | None,
        method: Method,
        schedule: ScheduleConfig,
        save: Callable[[TrainingState], None],
    ) -> None:
        self.context = context
        self.detector = detector
        self.subject: Subject = subject
        self.schedule = schedule
        self._method = method
        self._save_state = save
        self._image_cost = 1.0 if teacher is None else 1.0 + TEACHER_COST
        if schedule.frozen_stages:
            detector.freeze_stages(schedule.frozen_stages)
        if schedule.frozen_statistics:
            detector.freeze_statistics()
        self._step = Step(
            detector, method=method, teacher=teacher, schedule=schedule, group=context.group, device=context.device
        )
        self._batches = TrainingBatches(
            context.train_images,
            batch_size=schedule.batch_size,
            size=InputSize.taken_from(detector),
            augmentation=context.augmentation,
            device=context.device,
            masks=detector.trains_masks,
            cache_bytes=context.image_memory_bytes,
            rank=context.group.rank,
            world_size=context.group.size,
        )
        self._average = Average(detector, decay=schedule.ema_decay) if schedule.ema_decay else None
        self._best: Best | None = None
        self._running = Running()
        self._watch = Watch(context.reporter, subject, {})
        self._saved_at = time.monotonic()
        self._epochs_begun = 0
        self._compiled = [one for one in (detector, teacher) if one is not None and schedule.compile]
        forget_memory_peak(context.device)

    def run(self, resume: TrainingState | None) -> Best:
        """Train to the end, from the beginning or from a state of this training, and return the best detector.

        Raises:
            RunError: `loss_not_finite`, `out_of_memory`.
            Cancelled: the run was asked to end; a checkpoint of the last whole step stands.
        """
        first, start = (resume.epoch, resume.step) if resume else (0, 0)
        if resume:
            self._restore(resume)
        else:
            self._warn_of_warmup()
        self._warn_of_few_loaders()
        for epoch in range(first, self.schedule.epochs):
            with numerics(self.context.device, self.schedule.precision, shapes=self._batches.padded_shapes):
                self._train_epoch(epoch, start)
            start = 0
            done = epoch + 1
            if done % self.context.evaluation.every_epochs == 0 or done == self.schedule.epochs:
                self._measure(epoch)
            if self._out_of_patience(done):
                break
            if done < self.schedule.epochs:
                self._save(done, 0)
        assert self._best is not None, "the last epoch is always evaluated"
        if self._average:
            self.detector.load_state_dict(self._average.tensors)
        return self._best

    def _warn_of_warmup(self) -> None:
        schedule, steps = self.schedule, self.schedule.epochs * len(self._batches)
        warmups = {
            "learning rate": 0 if schedule.decay == "one_cycle" else schedule.warmup_steps,
            "distillation": self._method.warmup_steps,
        }
        for what, warmup in warmups.items():
            if warmup > steps:
                self.context.reporter.message(
                    "warn",
                    "warmup_longer_than_training",
                    f"the {self.subject}'s {what} warms up over {warmup} steps, and the whole training has {steps}: it "
                    f"never reaches its full strength; lower the warmup_steps of the {what}",
                )

    def _warn_of_few_loaders(self) -> None:
        batches = self._batches
        if batches.ahead == batches.wanted:
            return
        ahead, wanted, size = batches.ahead, batches.wanted, batches.batch_bytes / 1e6
        self.context.reporter.message(
            "warn",
            "little_memory_for_loading",
            f"{wanted.processes} processes would load batches ahead, and want {wanted.slots * size:.3g} MB for them; "
            f"this machine's free memory allows {ahead.processes}, {ahead.batches} ahead each: the GPU may wait for "
            "images; give the worker more memory",
        )

    def _warn_of_eager(self) -> None:
        for detector in self._compiled[:]:
            if detector.compilation_failure:
                self._compiled.remove(detector)
                who = self.subject if detector is self.detector else "teacher"
                self.context.reporter.message(
                    "warn",
                    "not_compiled",
                    f"the {who}'s trunk runs without torch.compile: {detector.compilation_failure}",
                )

    # ---- one epoch ----

    def _train_epoch(self, epoch: int, start: int) -> None:
        context, schedule = self.context, self.schedule
        steps = len(self._batches)
        batches = self._batches.epoch(seed_for(context.seed, self.subject, "order", epoch), start=start)
        self.detector.train()
        self._method.train()
        self._progress(epoch, epoch * steps + start, steps, images_per_s=None)  # as in `evaluate`
        looks: list[Look] = []
        self._epochs_begun += 1
        watch, asked_at = Stopwatch(), time.monotonic()
        for index, loaded in enumerate(batches, start):
            waited = time.monotonic() - asked_at
            step = epoch * steps + index
            batch = loaded.to(context.device)
            if self._epochs_begun <= inspection.EPOCHS and len(looks) < inspection.IMAGES:
                looks += inspection.look(batch, self._batches, index, most=inspection.IMAGES - len(looks))
                inspection.require_true_images(looks)
            # Each process draws for its own images.
            reseed(context.seed, self.subject, "step", step, context.group.rank)
            taken = self._step(
                batch,
                StepInfo(step=step, steps=steps * schedule.epochs, epoch=epoch, epochs=schedule.epochs),
                measured=step % MEASURE_EVERY == 0,
                cancelled=context.reporter.cancelled,
            )
            if self._average:
                self._average.update(self.detector, step=step)
            self._watch.look(taken.values, step=step)
            self._running.add({**taken.values, "data_wait": waited / (time.monotonic() - asked_at)})
            self._warn_of_eager()
            rate = watch.lap(schedule.batch_size)
            context.plan.advance(schedule.batch_size * self._image_cost)
            if (step + 1) % LOG_EVERY == 0 or index == steps - 1:
                self._log(step + 1, steps, images_per_s=rate)
            self._progress(epoch, step + 1, steps, images_per_s=rate)
            if taken.ending:
                self._save(epoch, index + 1)
                raise Cancelled
            if time.monotonic() - self._saved_at > 60 * schedule.checkpoint_minutes:
                self._save(epoch, index + 1)
            asked_at = time.monotonic()

    def _log(self, step: int, steps: int, *, images_per_s: float) -> None:
        means = self._running.take()
        means |= {"images_per_s": images_per_s, "memory_bytes": memory_bytes(self.context.device)}
        self.context.history.log_metrics(self.subject, step=step, epoch=step / steps, values=means)

    def _progress(self, epoch: int, step: int, steps: int, *, images_per_s: float | None) -> None:
        plan = self.context.plan
        self.context.reporter.progress(
            "teacher" if self.subject == "teacher" else "distillation",
            fraction=plan.fraction,
            epoch=epoch + 1,
            epochs=self.schedule.epochs,
            step=step,
            steps=steps * self.schedule.epochs,
            eta_s=plan.eta_s,
            images_per_s=images_per_s,
        )

    # ---- measuring ----

    def _measure(self, epoch: int) -> None:
        """Evaluate after an epoch, and keep the detector if it is the best one up to now."""
        context = self.context
        steps, before = len(self._batches), context.plan.done
        context.group.agree(self.detector.buffers())
        context.group.agree(self._average.tensors.values() if self._average else ())
        try:
            with self._average.applied(self.detector) if self._average else nullcontext():
                metrics = evaluate(context, self.detector, subject=self.subject, epoch=epoch + 1)
        except Cancelled:
            context.plan.done = before
            self._save(epoch, steps)
            raise
        if self._best is None or (metrics["ap"] or 0.0) > (self._best.metrics["ap"] or 0.0):
            # On the CPU: the device has the weights already, and perhaps their average.
            model = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._measured().items()}
            self._best = Best(epoch=epoch + 1, metrics=metrics, model=model)

    def _measured(self) -> dict[str, Tensor]:
        return self._average.tensors if self._average else self.detector.state_dict()

    def _out_of_patience(self, done: int) -> bool:
        schedule, best = self.schedule, self._best
        if best is None or not schedule.patience or done == schedule.epochs:
            return False
        without = (done - best.epoch) // self.context.evaluation.every_epochs
        if without < schedule.patience:
            return False
        self.context.reporter.message(
            "info",
            "stopped_early",
            f"no better AP of the {self.subject} in {without} measurements: ended at epoch {done}",
        )
        left, every = schedule.epochs - done, self.context.evaluation.every_epochs
        self.context.plan.skip(left * len(self.context.train_images) * self._image_cost)
        self.context.plan.skip(-(-left // every) * len(self.context.eval_images) * EVALUATION_COST)
        return True

    # ---- checkpoints ----

    def _save(self, epoch: int, step: int) -> None:
        self._saved_at = time.monotonic()
        if not self.context.group.is_main:
            return
        self._save_state(
            TrainingState(
                subject=self.subject,
                epoch=epoch,
                step=step,
                model=self.detector.state_dict(),
                method=self._method.state_dict(),
                optimizer=self._step.optimizer.state_dict(),
                scaler=self._step.scaler.state_dict(),
                average=self._average.tensors if self._average else None,
                running={"sums": dict(self._running.sums), "steps": dict(self._running.steps)},
                quiet_steps=dict(self._watch.quiet_steps),
                best=self._best,
                teacher=None,
                teacher_metrics=None,
                done=self.context.plan.done,
                history=self.context.history.state(),
            )
        )

    def _restore(self, state: TrainingState) -> None:
        self.detector.load_state_dict(state.model)
        self._method.load_state_dict(state.method)
        restore(self._step.optimizer, state.optimizer)
        self._step.scaler.load_state_dict(state.scaler)
        if self._average and state.average is not None:
            for name, tensor in state.average.items():
                self._average.tensors[name].copy_(tensor)
        self._running = Running(sums=state.running["sums"], steps=state.running["steps"])
        self._watch.quiet_steps = state.quiet_steps
        self._best = state.best
