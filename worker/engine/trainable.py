"""What keeps a detector from being trained by a schedule, said before anything is trained."""

from worker.detectors.base import Detector
from worker.engine.config import ScheduleConfig
from worker.report import RunError


def require_trainable(detector: Detector, schedule: ScheduleConfig, *, processes: int, where: str) -> None:
    """Refuse what would fail at the training's first step, or when it begins.

    Args:
        detector: who is to be trained.
        schedule: how.
        processes: how many share each batch.
        where: the schedule's place in the job's spec, for the error.

    Raises:
        RunError: `stages_cannot_freeze` if `frozen_stages` is not 0 and there are none; `batch_too_small` if a process
            gets fewer pictures at a time than the detector can train on; `sync_batch_norm_needs_gpus` if several
            processes would have to share batch norm's statistics on a CPU, where torch cannot.
    """
    if schedule.sync_batch_norm and processes > 1 and next(detector.parameters()).device.type == "cpu":
        raise RunError(
            "user",
            "sync_batch_norm_needs_gpus",
            f"{where}.sync_batch_norm is on, and the {processes} processes of this run have no GPUs: turn it off, or "
            "send the job to workers with GPUs",
        )
    detector.require_stages(schedule.frozen_stages)
    parts = processes * schedule.accumulation
    if schedule.batch_size // parts < detector.least_pictures:
        raise RunError(
            "user",
            "batch_too_small",
            f"{where}.batch_size {schedule.batch_size} in {parts} parts (processes: {processes}, accumulation: "
            f"{schedule.accumulation}) is {schedule.batch_size // parts} at a time, and this {type(detector).__name__} "
            f"wants {detector.least_pictures} or more: set it to {detector.least_pictures * parts} at least",
        )
