"""What to do about a batch that does not fit into memory: found out by trying smaller ones."""

from collections.abc import Callable

import torch

from defeat.engine.data.loading.batch import Batch
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig


def out_of_memory(told: str, batch: Batch, schedule: ScheduleConfig, advice: str | None) -> RunError:
    """Return the error for a batch whose parts do not fit, with torch's own words and what would do."""
    share = len(batch) // schedule.accumulation
    found = f"; {advice}" if advice else ""
    first = told.split("\n", 1)[0][:300]
    return RunError("oom", "out_of_memory", f"{share} images at a time do not fit into memory{found} ({first})")


def what_fits(attempt: Callable[[Batch], None], batch: Batch, schedule: ScheduleConfig, *, least: int) -> str:
    """Return which part of a batch fits, as advice: the largest for which `attempt` has memory.

    Args:
        attempt: a pass forward and backward; raises `torch.OutOfMemoryError`.
        batch: what did not fit in `schedule.accumulation` parts.
        schedule: how the detector is trained.
        least: how many images its training pass needs at least.
    """
    share = len(batch) // schedule.accumulation
    smaller = [size for size in range(share - 1, least - 1, -1) if share % size == 0]
    fits = next((size for size in smaller if _has_memory(attempt, next(batch.split(len(batch) // size)))), 0)
    if not fits:
        few = "one image fits" if least == 1 else f"{least} images fit"
        return f"not even {few}: lower the detector's min_size and max_size, or take a smaller one"
    return (
        f"{fits} at a time fit: that is accumulation {schedule.batch_size // fits} for the same batch_size "
        f"{schedule.batch_size}, or batch_size {fits * schedule.accumulation}"
    )


def _has_memory(attempt: Callable[[Batch], None], piece: Batch) -> bool:
    try:
        attempt(piece)
    except torch.OutOfMemoryError:
        return False
    return True
