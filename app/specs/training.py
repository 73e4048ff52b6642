"""Whether a detector can be trained as asked: what `defeat.engine.training.trainable` and its family would refuse."""

from collections.abc import Iterator, Mapping
from typing import Any

from app.request_models import Problem, pointer, problem
from app.specs.catalog import Catalog
from app.specs.levels import strides_of
from app.specs.validation import Path

# Families with batch norm on their coarsest map, which is one cell where images are no larger than its stride.
_NORMALISED = frozenset({"ssdlite"})


def training_problems(
    catalog: Catalog,
    detector: Mapping[str, Any],
    schedule: Mapping[str, Any],
    *,
    initial_weights: object,
    gpus: int,
    images: int | None,
    augmentation: Mapping[str, Any] | None,
    who: Path,
    where: Path,
) -> Iterator[Problem]:
    """Tell what keeps a detector from being trained by a schedule.

    Args:
        catalog: which detectors there are.
        detector: its spec, complete.
        schedule: likewise.
        initial_weights: as the job names them.
        gpus: how many processes share a batch.
        images: how many the training split has; None where that is not known.
        augmentation: of its images, complete; None where it has mistakes of its own.
        who: the place of the student or teacher in the body.
        where: that of the schedule.
    """
    family = detector["architecture"]
    if initial_weights == "imagenet" and detector.get("reduced_tail"):
        yield problem(
            pointer((*who, "detector", "reduced_tail")),
            "reduced_tail",
            f"the ImageNet weights of {detector['backbone']} are those of its whole last stage: set reduced_tail to "
            "false, or use initial_weights: random",
        )
    if schedule.get("frozen_stages") and "backbone" not in catalog.detectors[family]["provides"]:
        able = ", ".join(name for name, entry in catalog.detectors.items() if "backbone" in entry["provides"])
        yield problem(
            pointer((*where, "frozen_stages")),
            "stages_cannot_freeze",
            f"{family} has no stages that could be frozen: leave it at 0, or take one of {able}",
        )
    if images is not None and images < schedule["batch_size"]:
        yield problem(
            pointer((*where, "batch_size")),
            "too_few_images",
            f"the training split has {images} images: set it to that at most; got {schedule['batch_size']}",
        )
    scale = (augmentation["scale_min"], augmentation["scale_max"]) if augmentation else (1, 1)
    if "size" in detector and scale != (1, 1):
        yield problem(
            pointer(("augmentation", "scale_max" if scale[0] == 1 else "scale_min")),
            "fixed_input_size",
            f"the {who[0]} ({family}) sees every image at {detector['size']} x {detector['size']} px, whatever its "
            "scale: leave scale_min and scale_max at 1, or use zoom_out and iou_crop",
        )
    parts = gpus * schedule["accumulation"]
    if schedule["batch_size"] // parts == 1 and family in _NORMALISED and detector["size"] <= strides_of(detector)[-1]:
        yield problem(
            pointer((*where, "batch_size")),
            "batch_too_small",
            f"each process gets one image at a time, and at size {detector['size']} {family}'s coarsest map is one "
            f"cell, of which batch norm cannot train on one alone: set batch_size to {2 * parts} or more",
        )
