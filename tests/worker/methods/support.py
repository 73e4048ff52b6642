"""A tiny student and teacher, and one training pass over a few pictures."""

import torch

from tests.worker.support_engine import CLASSES, TINY, images_and_targets
from worker import detectors
from worker.detectors.base import Detector, TrainPass
from worker.methods import Clock

START = Clock(step=0, steps=10, epoch=0, epochs=1)


def pair(*, student_channels: int = 8, teacher_channels: int = 16) -> tuple[Detector, Detector]:
    """Return a student in training mode and a frozen teacher in eval mode, as a run has them."""
    torch.manual_seed(0)
    student = detectors.build({**TINY, "pyramid_channels": student_channels}, CLASSES).train()
    teacher = detectors.build({**TINY, "pyramid_channels": teacher_channels}, CLASSES)
    return student, teacher.eval().requires_grad_(False)


def one_pass(student: Detector, seed: int = 0) -> TrainPass:
    """Return a training pass whose random numbers start from `seed`."""
    images, targets = images_and_targets(seed=seed)
    torch.manual_seed(seed)
    return student.train_pass(images, targets)
