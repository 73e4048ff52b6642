"""Whether a detector can be trained as asked: what the engine would reject before the training starts."""

from collections.abc import Iterator, Mapping
from typing import Any

from app.request_models import Problem
from app.specs.catalog import Catalog
from app.specs.levels import strides_of
from app.specs.validation import problem_of
from defeat.rules import Path
from defeat.rules.training import Trainee, least_images, not_with_imagenet, training_findings


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
    """Return what keeps a detector from being trained by a schedule.

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
    if initial_weights == "imagenet":
        for key, field in catalog.fields(detector).items():
            if "x-not-with-imagenet" in field and detector[key]:
                yield problem_of(not_with_imagenet(key, detector["backbone"], who))
    family, size = catalog.family(detector), detector.get("size")
    trainee = Trainee(
        who=str(who[0]),
        family=detector["architecture"],
        size=size,
        least_images=least_images(
            normalizes_coarsest_map=family["normalizes_coarsest_map"],
            size=size,
            coarsest_stride=strides_of(catalog, detector)[-1],
        ),
        freezable="backbone" in family["provides"],
    )
    found = training_findings(
        trainee,
        batch_size=schedule["batch_size"],
        accumulation=schedule["accumulation"],
        frozen_stages=schedule.get("frozen_stages", 0),
        gpus=gpus,
        images=images,
        scale=(augmentation["scale_min"], augmentation["scale_max"]) if augmentation else None,
        freezable_families=[name for name, entry in catalog.detectors.items() if "backbone" in entry["provides"]],
        where=where,
    )
    yield from map(problem_of, found)
