"""What the trainings of a run share: data, device, processes, progress and metrics; and how a detector is evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from defeat.engine.data.canonical import CanonicalDataset, Split
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.loader import ImageReader
from defeat.engine.detectors.base import Detector
from defeat.engine.evaluation.config import EvaluationConfig
from defeat.engine.evaluation.evaluate import coco_metrics, detect_split
from defeat.engine.events import Subject
from defeat.engine.report import Cancelled, Reporter, RunError
from defeat.engine.training.checkpoint import TrainingCheckpoint
from defeat.engine.training.config import JobConfig, TrainedTeacherConfig
from defeat.engine.training.logger import MetricsLogger, Progress
from defeat.engine.training.process_group import ProcessGroup

# The cost of evaluating an image, and of a frozen teacher's forward pass, in units of training on an image once. Only
# the progress bar depends on them.
EVALUATION_COST = 0.35
TEACHER_COST = 0.3


@dataclass(kw_only=True)
class RunContext:
    """What all trainings of a run share.

    Attributes:
        dataset: the canonical dataset.
        train_images: the training split.
        eval_images: the evaluation split.
        evaluation: how detectors are evaluated.
        augmentation: random changes to training images.
        seed: the job's seed.
        device: where this process trains.
        reporter: writes events and artifacts.
        logger: logs metrics.
        progress: of the whole run.
        group: the processes that train together.
        image_memory_bytes: memory for decoded images; None: chosen by free memory.
    """

    dataset: CanonicalDataset
    train_images: ImageReader
    eval_images: ImageReader
    evaluation: EvaluationConfig
    augmentation: AugmentationConfig
    seed: int
    device: torch.device
    reporter: Reporter
    logger: MetricsLogger
    progress: Progress
    group: ProcessGroup
    image_memory_bytes: int | None

    @classmethod
    def create(
        cls,
        config: JobConfig,
        dataset: CanonicalDataset,
        inputs: Mapping[str, Any],
        *,
        device: torch.device,
        reporter: Reporter,
        group: ProcessGroup,
    ) -> "RunContext":
        """Return the context of a run from its parsed spec and its inputs.

        Raises:
            RunError: `split_missing` if the dataset has no training split or not the one to evaluate on.
        """
        root = Path(inputs["dataset"])
        train_images = _images(dataset, root, "train")
        eval_images = _images(dataset, root, config.evaluation.split)
        return cls(
            dataset=dataset,
            train_images=train_images,
            eval_images=eval_images,
            evaluation=config.evaluation,
            augmentation=config.augmentation,
            seed=config.seed,
            device=device,
            reporter=reporter,
            logger=MetricsLogger(reporter=reporter),
            progress=Progress(total=_total_work(config, train=len(train_images), evaluation=len(eval_images))),
            group=group,
            image_memory_bytes=inputs["image_memory_bytes"],
        )

    def evaluate(self, detector: Detector, *, subject: Subject, epoch: int) -> dict[str, Any]:
        """Evaluate a detector on the evaluation split, log its metrics and return them. Each process does its share.

        Raises:
            Cancelled: a process was asked to end.
        """

        def _on_batch(images: int) -> None:
            if self.group.is_single:  # one of several that stopped by itself would leave the others waiting
                self.reporter.check_cancelled()
            self.progress.advance(images * self.group.size * EVALUATION_COST)
            self._report_evaluation(epoch)

        # Reported before it begins, so that a failure in its first batch is attributed to this phase.
        self._report_evaluation(epoch)
        detections = detect_split(
            detector,
            self.eval_images,
            batch_size=self.evaluation.batch_size,
            device=self.device,
            on_batch=_on_batch,
            rank=self.group.rank,
            world_size=self.group.size,
        )
        shares = self.group.gather((detections, self.reporter.cancelled))
        if any(cancelled for _, cancelled in shares):
            raise Cancelled
        by_image = {image: found for share, _ in shares for image, found in share.items()}
        metrics = coco_metrics(self.dataset, self.evaluation.split, by_image)
        self.logger.log_evaluation(subject, epoch=epoch, metrics=metrics)
        return metrics

    def _report_evaluation(self, epoch: int) -> None:
        progress = self.progress
        self.reporter.progress("evaluation", fraction=progress.fraction, epoch=epoch, eta_s=progress.eta_s)

    def save(self, checkpoint: TrainingCheckpoint) -> None:
        """Write the one training checkpoint that the run keeps, and offer it to another attempt."""
        path = self.reporter.directory / "checkpoints" / "last.pt"
        checkpoint.save(path)
        self.reporter.checkpoint(path)

    def resume(self, checkpoint: TrainingCheckpoint) -> None:
        """Continue the progress and the metrics of an earlier attempt."""
        self.logger.load_state_dict(checkpoint.history)
        self.progress.done = checkpoint.done
        steps = f" and {checkpoint.step} steps" if checkpoint.step else ""
        self.reporter.message(
            "info", "resumed", f"continues after epoch {checkpoint.epoch}{steps} of the {checkpoint.subject}'s training"
        )


def _images(dataset: CanonicalDataset, root: Path, split: Split) -> ImageReader:
    images = dataset.in_split(split)
    if not images:
        splits = ", ".join(dataset.counts())
        raise RunError("user", "split_missing", f"the dataset has no {split} split; it has: {splits}")
    return ImageReader(root, images)


def image_cost(*, with_teacher: bool) -> float:
    """Return the work of training on one image, in training passes of a detector without a teacher."""
    return 1.0 + TEACHER_COST if with_teacher else 1.0


def _total_work(config: JobConfig, *, train: int, evaluation: int) -> float:
    """Return the work of a whole run with so many images in its two splits."""
    every, evaluated = config.evaluation.every_epochs, evaluation * EVALUATION_COST
    cost = image_cost(with_teacher=config.teacher is not None)
    total = config.schedule.epochs * train * cost + evaluated * -(-config.schedule.epochs // every)
    if isinstance(config.teacher, TrainedTeacherConfig):
        epochs = config.teacher.schedule.epochs
        total += epochs * train + evaluated * -(-epochs // every)
    elif config.teacher is not None:
        total += evaluated
    return total
