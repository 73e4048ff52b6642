"""A tiny student and teacher, and one training pass over a few images."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from defeat.engine import detectors
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.methods import StepInfo
from tests.support.training import CLASSES, TINY, images_and_targets

START = StepInfo(step=0, steps=10, epoch=0, epochs=1)


def pair(
    *, student_channels: int = 8, teacher_channels: int = 16, box_head: str = "linear"
) -> tuple[Detector, Detector]:
    """Return a student in training mode, with this box head, and a frozen teacher in eval mode, as a run has them."""
    torch.manual_seed(0)
    student = detectors.build({**TINY, "pyramid_channels": student_channels, "box_head": box_head}, CLASSES).train()
    teacher = detectors.build({**TINY, "pyramid_channels": teacher_channels}, CLASSES)
    return student, teacher.eval().requires_grad_(False)


def one_pass(student: Detector, seed: int = 0) -> TrainPass:
    """Return a training pass whose random numbers start from `seed`."""
    images, targets = images_and_targets(seed=seed)
    torch.manual_seed(seed)
    return student.forward_train(images, targets)


def on_two_processes(work: Callable[[int], Any], directory: Path) -> list[Any]:
    """Return what `work(rank)` returns, plain numbers and lists of them, in each of two that train together."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def _run(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
        try:
            results.put((rank, work(rank)))
        finally:
            distributed.destroy_process_group()

    ranks = [context.Process(target=_run, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode == 0
    return [found[rank] for rank in range(2)]


def levels(seed: int = 0, *, channels: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return float64 maps of three levels: the student's, with gradients, and the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, channels, 5, 4), (2, channels, 3, 2), (2, channels, 2, 1)]
    student = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    teacher = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in shapes]
    return student, teacher


def assert_same_loss(ours: torch.Tensor, plain: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Hold a loss and its gradients in `inputs` to a plain restatement's, 1e-5 relative."""
    assert plain.item() != 0
    assert abs(ours.item() - plain.item()) <= 1e-5 * abs(plain.item())
    gradients = torch.autograd.grad(ours, inputs, retain_graph=True)
    for mine, theirs in zip(gradients, torch.autograd.grad(plain, inputs, retain_graph=True), strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
