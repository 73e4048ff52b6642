"""Rules for training a detector by a schedule, from a few facts about its family."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from defeat.rules import Finding, Path


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What the rules ask of a detector that is to be trained.

    Attributes:
        who: `student` or `teacher`.
        family: its architecture.
        size: side of the square that it resizes each image to, px; None where images keep their shape.
        least_images: minimum number of images of a training pass, see `least_images`.
        freezable: whether stages of its backbone can be frozen.
    """

    who: str
    family: str
    size: int | None
    least_images: int
    freezable: bool


def least_images(*, normalizes_coarsest_map: bool, size: int | None, coarsest_stride: int) -> int:
    """Return the minimum number of images of a training pass.

    It is 2 where batch norm sees a coarsest map of one cell, of which one image alone has no variance.

    Args:
        normalizes_coarsest_map: whether the family has batch norm there.
        size: of the square that images are resized to, px; None where they keep their shape.
        coarsest_stride: of the pyramid, px.
    """
    return 2 if normalizes_coarsest_map and size is not None and size <= coarsest_stride else 1


def training_findings(
    trainee: Trainee,
    *,
    batch_size: int,
    accumulation: int,
    frozen_stages: int,
    gpus: int,
    images: int | None,
    scale: tuple[float, float] | None,
    freezable_families: Sequence[str],
    where: Path,
) -> Iterator[Finding]:
    """Return what keeps a detector from being trained.

    Args:
        trainee: the detector.
        batch_size: of the schedule.
        accumulation: likewise.
        frozen_stages: likewise.
        gpus: how many processes share a batch.
        images: how many the training split has; None where that is not known.
        scale: the augmentation's scale_min and scale_max; None where they are not known.
        freezable_families: those whose backbones have stages that can be frozen; none: they are not named.
        where: the schedule's place.
    """
    if frozen_stages and not trainee.freezable:
        yield cannot_freeze(trainee.family, freezable_families, where)
    if images is not None and images < batch_size:
        yield Finding(
            (*where, "batch_size"),
            "too_few_images",
            f"the training split has {images} images: set it to that at most; got {batch_size}",
        )
    if trainee.size is not None and scale is not None and scale != (1, 1):
        yield Finding(
            ("augmentation", "scale_max" if scale[0] == 1 else "scale_min"),
            "fixed_input_size",
            f"the {trainee.who} ({trainee.family}) sees every image at {trainee.size} x {trainee.size} px, whatever "
            "its scale: leave scale_min and scale_max at 1, or use zoom_out and iou_crop",
        )
    parts = gpus * accumulation
    # 0 images a part is the rule of batch_shares.
    if 0 < batch_size // parts < trainee.least_images:
        yield batch_too_small(trainee, parts, where)


def not_with_imagenet(key: str, backbone: str, who: Path) -> Finding:
    """Return the finding for a flag of a detector that changes the backbone, which is to start from ImageNet weights.

    Args:
        key: the flag's, which is also the code.
        backbone: its name.
        who: the place of the student or teacher.
    """
    return Finding(
        (*who, "detector", key),
        key,
        f"the ImageNet weights of {backbone} are those of its whole last stage: set {key} to false, or use "
        "initial_weights: random",
    )


def cannot_freeze(family: str, freezable_families: Sequence[str], where: Path) -> Finding:
    """Return the finding for a family without stages that could be frozen."""
    others = f"one of {', '.join(freezable_families)}" if freezable_families else "a family on a feature pyramid"
    return Finding(
        (*where, "frozen_stages"),
        "stages_cannot_freeze",
        f"{family} has no stages that could be frozen: leave it at 0, or take {others}",
    )


def batch_too_small(trainee: Trainee, parts: int, where: Path) -> Finding:
    """Return the finding for a batch whose parts have too few images for batch norm."""
    return Finding(
        (*where, "batch_size"),
        "batch_too_small",
        f"each process gets one image at a time, and at size {trainee.size} {trainee.family}'s coarsest map is one "
        "cell, of which batch norm cannot train on one alone: set batch_size to "
        f"{trainee.least_images * parts} or more",
    )


def batch_shares(batch_size: int, *, gpus: int, accumulation: int, where: Path) -> Iterator[Finding]:
    """Return a finding if a batch cannot be cut into equal parts; `where` is the schedule's place."""
    shares = gpus * accumulation
    if batch_size % shares:
        yield Finding(
            (*where, "batch_size"),
            "out_of_range",
            f"it must be a multiple of resources.gpus x accumulation, which is {shares}, so that each GPU gets an "
            f"equal share; got {batch_size}",
        )
