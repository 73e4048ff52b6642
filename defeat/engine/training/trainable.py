"""Checks, before any training, whether a detector can be trained by a schedule."""

from defeat.engine.config import require
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.detectors.base import Detector
from defeat.engine.events import Subject
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig
from defeat.rules.training import training_findings


def require_trainable(
    detector: Detector,
    schedule: ScheduleConfig,
    augmentation: AugmentationConfig,
    *,
    images: int,
    processes: int,
    who: Subject,
    where: str,
) -> None:
    """Reject what would fail when the training begins, or at its first step.

    Args:
        detector: the detector to train.
        schedule: its schedule.
        augmentation: of its images.
        images: how many images the training split has.
        processes: how many processes share each batch.
        who: the detector's role, for the error.
        where: the schedule's place in the job's spec, for the error.

    Raises:
        RunError: `too_few_images` if there is not one whole batch; `fixed_input_size` if the input size is to vary and
            cannot; `sync_batch_norm_needs_gpus` if several processes would have to share batch norm's statistics on a
            CPU, where torch cannot; `stages_cannot_freeze` if `frozen_stages` is not 0 and the detector has no stages;
            `batch_too_small` if a process gets fewer images at a time than the detector can train on.
    """
    found = training_findings(
        detector.trainee(who),
        batch_size=schedule.batch_size,
        accumulation=schedule.accumulation,
        frozen_stages=schedule.frozen_stages,
        gpus=processes,
        images=images,
        scale=(augmentation.scale_min, augmentation.scale_max),
        freezable_families=(),
        where=tuple(where.split(".")),
    )
    require(found)
    if schedule.sync_batch_norm and processes > 1 and next(detector.parameters()).device.type == "cpu":
        raise RunError(
            "user",
            "sync_batch_norm_needs_gpus",
            f"{where}.sync_batch_norm is on, and the {processes} processes of this run have no GPUs: turn it off, or "
            "send the job to workers with GPUs",
        )
