"""The setups of `benchmarks.gain`: data, teacher, student, schedules and methods.

Sized for one CPU thread: a student's run takes about a minute. All weights start random.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Data = Literal["digits", "bccd"]
Architecture = Literal["faster_rcnn", "retinanet"]
Spec = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One comparison: every method trains the same student on the same data by the same schedule.

    Attributes:
        teacher: the teacher's detector spec.
        student: the student's; its pyramid has the teacher's channels, because PKD compares channel by channel.
        teacher_schedule: how the teacher is trained, once, on the whole training split.
        student_schedule: how each student is trained.
        student_images: how many images of the training split the students see; None: all.
        horizontal_flip: probability of flipping a training image; 0 for digits, which change their meaning.
        split: the split that AP is measured on.
    """

    teacher: Spec
    student: Spec
    teacher_schedule: Spec
    student_schedule: Spec
    student_images: int | None
    horizontal_flip: float
    split: str


_TWO_STAGE: Spec = {
    "architecture": "faster_rcnn",
    "strides": [4, 8, 16],
    "pool_level": False,
    "pyramid_channels": 32,
    "anchor_scale": 6,
    "train_proposals": 300,
    "test_proposals": 150,
    "box_samples": 64,
    "head_channels": 128,
}
_ONE_STAGE: Spec = {
    "architecture": "retinanet",
    "strides": [8, 16, 32],
    "extra_levels": "none",
    "pyramid_channels": 32,
    "anchor_scale": 2,
}
_DETECTORS: dict[Architecture, Spec] = {"faster_rcnn": _TWO_STAGE, "retinanet": _ONE_STAGE}
_SIZES: dict[Data, Spec] = {
    "digits": {"min_size": 128, "max_size": 160},
    "bccd": {"min_size": 180, "max_size": 240},
}
_SGD: Spec = {"optimizer": "sgd", "learning_rate": 0.02}
_ADAMW: Spec = {"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.01}
_OPTIMIZERS: dict[tuple[Data, Architecture], Spec] = {
    ("digits", "faster_rcnn"): _SGD,
    ("digits", "retinanet"): _ADAMW,
    ("bccd", "faster_rcnn"): _ADAMW,
    ("bccd", "retinanet"): _ADAMW,
}
# Of the teacher and of the students. RetinaNet's narrow heads start with small gradients, and learn to classify late.
_EPOCHS: dict[tuple[Data, Architecture], tuple[int, int]] = {
    ("digits", "faster_rcnn"): (6, 6),
    ("digits", "retinanet"): (20, 40),
    ("bccd", "faster_rcnn"): (9, 12),
    ("bccd", "retinanet"): (30, 20),
}


def setup(data: Data, architecture: Architecture) -> Setup:
    """Return the comparison on this data with this family of detectors."""
    common = {**_DETECTORS[architecture], **_SIZES[data]}
    schedule = {"batch_size": 4, "decay": "cosine", "warmup_steps": 50, **_OPTIMIZERS[data, architecture]}
    teacher_epochs, student_epochs = _EPOCHS[data, architecture]
    return Setup(
        teacher={**common, "backbone": "timm/resnet10t"},
        student={**common, "backbone": "timm/mobilenetv3_small_050"},
        teacher_schedule={**schedule, "epochs": teacher_epochs},
        student_schedule={**schedule, "epochs": student_epochs},
        student_images=200 if data == "digits" else None,
        horizontal_flip=0.0 if data == "digits" else 0.5,
        split="val" if data == "digits" else "test",
    )


def quick(full: Setup) -> Setup:
    """Return a small version, which tests that every part runs, and says nothing about the methods."""
    small = {"backbone": "timm/mobilenetv3_small_050", "pyramid_channels": 8}
    return replace(
        full,
        teacher={**full.teacher, **small},
        student={**full.student, **small},
        teacher_schedule={**full.teacher_schedule, "epochs": 1},
        student_schedule={**full.student_schedule, "epochs": 1},
        student_images=8,
    )


def methods(full: Setup) -> dict[str, Spec]:
    """Return the `distillation` sections of the methods that the command knows by name."""
    # A one-stage detector has no proposals to compare.
    two_stage = full.student["architecture"] == "faster_rcnn"
    head: Spec = {} if two_stage else {"head_object_weight": 0.0, "head_background_weight": 0.0}
    return {
        "baseline": {"method": "baseline"},
        "defeat": {"method": "defeat", **head},
        "defeat_auto": {"method": "defeat", **head, "weights": "auto"},
        "fitnet": {"method": "fitnet"},
        "pkd": {"method": "pkd"},
        "cwd": {"method": "cwd"},
        "fgd": {"method": "fgd"},
        "mgd": {"method": "mgd"},
        "fgfi": {"method": "fgfi"},
        "frs": {"method": "frs"},
    }
