"""What keeps a detector from being trained by a schedule, said before anything is trained."""

from typing import Any, cast

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
    """Refuse what would fail at the training's first step, or when it begins.

    Args:
        detector: who is to be trained.
        schedule: how.
        augmentation: of its images.
        images: how many the training split has.
        processes: how many share each batch.
        where: the schedule's place in the job's spec, for the error.

    Raises:
        RunError: `stages_cannot_freeze` if `frozen_stages` is not 0 and there are none; `batch_too_small` if a process
            gets fewer images at a time than the detector can train on; `sync_batch_norm_needs_gpus` if several
            processes would have to share batch norm's statistics on a CPU, where torch cannot; `too_few_images` if
            there is not one whole batch; `fixed_input_size` if the input size is to vary and cannot.
    """
    if images < schedule.batch_size:
        raise RunError(
            "user",
            "too_few_images",
            f"the training split has {images} images, {where}.batch_size is {schedule.batch_size}: lower it to "
            "that at most",
        )
    fixed, scale = cast(Any, detector).transform.fixed_size, (augmentation.scale_min, augmentation.scale_max)
    if fixed is not None and scale != (1.0, 1.0):
        raise RunError(
            "user",
            "fixed_input_size",
            f"augmentation.scale_min and scale_max are {scale[0]:g} and {scale[1]:g}, and a {type(detector).__name__} "
            f"sees every image at {fixed[0]}x{fixed[1]}: leave both at 1, or use zoom_out and iou_crop",
        )
    if schedule.sync_batch_norm and processes > 1 and next(detector.parameters()).device.type == "cpu":
        raise RunError(
            "user",
            "sync_batch_norm_needs_gpus",
            f"{where}.sync_batch_norm is on, and the {processes} processes of this run have no GPUs: turn it off, or "
            "send the job to workers with GPUs",
        )
    detector.require_stages(schedule.frozen_stages)
    parts = processes * schedule.accumulation
    if schedule.batch_size // parts < detector.least_images:
        raise RunError(
            "user",
            "batch_too_small",
            f"{where}.batch_size {schedule.batch_size} in {parts} parts (processes: {processes}, accumulation: "
            f"{schedule.accumulation}) is {schedule.batch_size // parts} at a time, and this {type(detector).__name__} "
            f"wants {detector.least_images} or more: set it to {detector.least_images * parts} at least",
        )
