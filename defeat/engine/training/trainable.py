"""Checks, before any training, whether a detector can be trained by a schedule."""

from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.detectors.base import Detector
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig


def require_trainable(
    detector: Detector,
    schedule: ScheduleConfig,
    augmentation: AugmentationConfig,
    *,
    images: int,
    processes: int,
    where: str,
) -> None:
    """Reject what would fail when the training begins, or at its first step.

    Args:
        detector: the detector to train.
        schedule: its schedule.
        augmentation: of its images.
        images: how many images the training split has.
        processes: how many processes share each batch.
        where: the schedule's place in the job's spec, for the error.

    Raises:
        RunError: `too_few_images` if there is not one whole batch; `fixed_input_size` if the input size is to vary and
            cannot; `sync_batch_norm_needs_gpus` if several processes would have to share batch norm's statistics on a
            CPU, where torch cannot; `stages_cannot_freeze` if `frozen_stages` is not 0 and the detector has no stages;
            `batch_too_small` if a process gets fewer images at a time than the detector can train on.
    """
    if images < schedule.batch_size:
        raise RunError(
            "user",
            "too_few_images",
            f"the training split has {images} images, and {where}.batch_size is {schedule.batch_size}: set it to "
            f"{images} or less",
        )
    _require_fixed_size(detector, augmentation)
    if schedule.sync_batch_norm and processes > 1 and next(detector.parameters()).device.type == "cpu":
        raise RunError(
            "user",
            "sync_batch_norm_needs_gpus",
            f"{where}.sync_batch_norm is on, and the {processes} processes of this run have no GPUs: turn it off, or "
            "send the job to workers with GPUs",
        )
    detector.require_stages(schedule.frozen_stages)
    _require_images_per_pass(detector, schedule, processes=processes, where=where)


def _require_fixed_size(detector: Detector, augmentation: AugmentationConfig) -> None:
    low, high = augmentation.scale_min, augmentation.scale_max
    if detector.fixed_size is not None and (low, high) != (1.0, 1.0):
        height, width = detector.fixed_size
        raise RunError(
            "user",
            "fixed_input_size",
            f"augmentation.scale_min and scale_max are {low:g} and {high:g}, and a {type(detector).__name__} resizes "
            f"every image to {width}x{height}: leave both at 1, or use zoom_out and iou_crop",
        )


def _require_images_per_pass(detector: Detector, schedule: ScheduleConfig, *, processes: int, where: str) -> None:
    parts = processes * schedule.accumulation
    images = schedule.batch_size // parts
    if images < detector.least_images:
        raise RunError(
            "user",
            "batch_too_small",
            f"{where}.batch_size {schedule.batch_size} in {parts} parts (processes: {processes}, accumulation: "
            f"{schedule.accumulation}) is {images} images at a time, and this {type(detector).__name__} needs "
            f"{detector.least_images} or more: set it to {detector.least_images * parts} or more",
        )
