"""A step makes the CPU wait for a GPU once: for the copy of all its numbers.

`tests/defeat/engine/detectors/test_waits.py` counts the waits of the detector's own matching and sampling.
"""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from defeat.engine import detectors, methods
from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.resize import disable_training_resize
from defeat.engine.detectors import unblocked
from defeat.engine.detectors.retinanet import RetinaNetDetector
from defeat.engine.methods.base import StepInfo
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.process_group import ProcessGroup
from defeat.engine.training.step import Step
from tests.support.device_waits import Waits, fake_cuda
from tests.support.one_stage import RETINANET
from tests.support.training import CLASSES, images_and_targets

CUDA = torch.device("cuda")
NECK = {"method": "defeat", "head_object_weight": 0, "head_background_weight": 0}


@pytest.fixture(autouse=True)
def _simple(monkeypatch):
    """Replace matching and the copy of the numbers; constants that are made here are not kept for other tests."""

    def _losses(self, targets, outputs, anchors, levels):
        return {"classification": outputs["cls_logits"].mean(), "bbox_regression": outputs["bbox_regression"].mean()}

    def _mean(self, values):
        with _disable_current_modes():
            return torch.ones(len(values))

    monkeypatch.setattr(RetinaNetDetector, "match_and_compare", _losses)
    monkeypatch.setattr(ProcessGroup, "mean", _mean)
    unblocked._constant.cache_clear()
    yield
    unblocked._constant.cache_clear()


def batch_of(count):
    images, targets = images_and_targets(count)
    return Batch.of([((255 * image).byte(), target) for image, target in zip(images, targets, strict=True)])


def step_on(device, **changes):
    schedule = ScheduleConfig(**{"batch_size": 4, "accumulation": 2, "norm_weight_decay": False, **changes})
    with device:
        student = detectors.build(RETINANET, CLASSES).train()
        teacher = detectors.build({**RETINANET, "pyramid_channels": 24}, CLASSES).eval().requires_grad_(False)
        method = methods.build([{**NECK, "weight": 1.0}, {"method": "fgd", "weight": 0.5}], student, teacher)
    disable_training_resize(student)
    return Step(student, method=method, teacher=teacher, schedule=schedule, group=ProcessGroup(), device=device)


def step_info(number):
    return StepInfo(step=number, steps=1000, epoch=0, epochs=1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_copies_to_and_from_a_gpu_wait_for_nothing_but_the_numbers(precision, optimizer, monkeypatch):
    """On fake CUDA tensors, but for the way back: without a GPU torch's engine cannot go it."""
    with fake_cuda() as waits:
        step = step_on(CUDA, precision=precision, optimizer=optimizer)
        parameters = [*step.losses.parameters()]

        def _backward(_loss):
            for one in parameters:
                one.grad = torch.zeros_like(one)

        monkeypatch.setattr(torch.Tensor, "backward", _backward)
        fused = []  # the update of all parameters at once, which has no fake form
        for name in ("_fused_sgd_", "_fused_adamw_"):
            monkeypatch.setattr(torch, name, lambda parameters, *_, **__: fused.append(len(parameters)))
        for number in (100, 101):
            if number == 101:
                waits.found.clear()  # what is found out, or made, once
            taken = step(batch_of(4), step_info(number))
    assert waits.found == []
    assert sum(fused) == 2 * len(parameters)
    assert set(taken.values) >= {"loss/defeat/neck_object", "gradient_norm", "adapter_gradient_norm"}


@pytest.mark.parametrize("measured", [False, True])
def test_no_shape_and_no_value_of_a_whole_step_comes_from_the_device(measured):
    step = step_on(torch.device("cpu"))
    step(batch_of(4), step_info(100), measured=measured)
    with Waits() as waits:
        step(batch_of(4), step_info(101), measured=measured)
    assert waits.found == []
