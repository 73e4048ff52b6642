"""No method makes the CPU wait for a GPU: not by a copy, not by a shape that follows from values.

The methods run on fake CUDA tensors, which have shapes and devices but no values: `tests.support.device_waits`. Both
detectors are real. What they would hand out is made of fake tensors, of the shapes that they hand out on a CPU:
torchvision's own losses and samplers do wait. Without a GPU, autograd does not run on fake CUDA tensors: the gradients
that a measured step asks for are stood in for, and every backward pass runs on a CPU under the same record.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from defeat.engine import detectors, methods
from defeat.engine.methods import METHODS, StepInfo, losses
from defeat.engine.methods.balance import FIRST_STEPS
from defeat.engine.methods.base import TeacherPass
from defeat.engine.methods.losses import _SquaredDifferences
from tests.support.device_waits import Waits, fake_cuda
from tests.support.methods import one_pass
from tests.support.training import CLASSES, TINY

BACKBONE = {"backbone_object_weight": 1.0, "backbone_background_weight": 1.0}
SPECS = {name: {"method": name} for name in METHODS if name != "baseline"}
SPECS |= {
    f"defeat-{proposals}-{weights}-{mask}": {
        "method": "defeat",
        "proposals": proposals,
        "weights": weights,
        "mask": mask,
        **BACKBONE,
    }
    for proposals in ("student", "teacher", "both")
    for weights in ("fixed", "auto")
    for mask in ("paper", "cover")
}
SPECS["combined"] = [{"method": name} for name in METHODS if name != "baseline"]
# On a GPU these read, on the CPU, the value that they fill in: the record does not know them.
VALUE_READ = {"aten.masked_fill.Tensor", "aten.masked_fill_.Tensor"}
MEASURED, ORDINARY = (StepInfo(step=step, steps=100, epoch=0, epochs=1) for step in (0, FIRST_STEPS))


class Named(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def passes():
    """A student, its teacher, and what both hand out on a CPU."""
    torch.manual_seed(0)
    student, teacher = (detectors.build({**TINY, "strides": [8, 16, 32]}, CLASSES) for _ in range(2))
    student, teacher = student.train(), teacher.eval().requires_grad_(False)
    passed = one_pass(student)
    taught = TeacherPass(teacher, passed)
    logits = taught.score_proposals(taught.samples[0])
    return student, teacher, passed, taught, logits


def fake(value, *, trained=False):
    """The same with fake CUDA tensors; those of floats are `trained` or not."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="cuda", requires_grad=trained and value.is_floating_point())
    if isinstance(value, dict):
        return {key: fake(one, trained=trained) for key, one in value.items()}
    return [fake(one, trained=trained) for one in value]


def fake_pass(passed, boxes):
    """The student's pass with fake tensors, and so many boxes in each image."""
    features, backbone = fake(dict(passed.features), trained=True), fake(passed.backbone, trained=True)
    reached = sum(one.sum() for one in features.values())

    def score(proposals):
        return reached + torch.empty(sum(map(len, proposals)), len(CLASSES) + 1, device="cuda")

    proposals = fake(passed.proposals)
    return dataclasses.replace(
        passed,
        images=fake(passed.images),
        targets=[
            {
                "boxes": torch.empty(count, 4, device="cuda"),
                "labels": torch.empty(count, dtype=torch.long, device="cuda"),
            }
            for count in boxes
        ],
        features=features,
        backbone=backbone,
        losses=dict.fromkeys(passed.losses, reached * 1.0),
        proposals=proposals,
        labels=fake(passed.labels),
        class_logits=score(proposals),
        score_proposals=score,
        anchors=fake(passed.anchors),
        cell_logits=fake(passed.cell_logits, trained=True),
    )


def fake_teacher(taught):
    return SimpleNamespace(
        features=fake(dict(taught.features)),
        backbone=fake(taught.backbone),
        cell_logits=fake(taught.cell_logits),
        samples=fake(taught.samples),
        score_proposals=lambda proposals: torch.empty(sum(map(len, proposals)), len(CLASSES) + 1, device="cuda"),
    )


@pytest.mark.parametrize("step_info", [MEASURED, ORDINARY], ids=["measured", "ordinary"])
@pytest.mark.parametrize("boxes", [(0, 0, 0), (2, 0, 5)], ids=["no-boxes", "boxes"])
@pytest.mark.parametrize("name", SPECS)
def test_losses_on_a_gpu_wait_for_nothing(passes, monkeypatch, name, boxes, step_info):
    student, teacher, passed, taught, _ = passes

    def gradients(_loss, features, **_):
        return tuple(torch.empty_like(one) for one in features)

    with fake_cuda() as waits:
        monkeypatch.setattr(torch.autograd, "grad", gradients)
        # Block by block, for Triton launches nothing on fake tensors: `test_kernels.py` has the launches.
        monkeypatch.setattr(losses, "kernels_for", lambda *_: None)
        with torch.device("cuda"):
            method = methods.build(SPECS[name], student, teacher)
        ours, theirs = fake_pass(passed, boxes), fake_teacher(taught)
        waits.found.clear()  # of what was made for the test
        with Named() as named:
            found = method.losses(ours, theirs, step_info)
    assert found
    assert all(loss.device.type == "cuda" and loss.shape == () for loss in found.values())
    assert waits.found == []
    assert not named.found & VALUE_READ


@pytest.mark.parametrize("name", SPECS)
def test_the_backward_pass_asks_for_no_value(passes, name):
    student, teacher, passed, taught, logits = passes
    method = methods.build(SPECS[name], student, teacher)
    # Torchvision's heads pick the proposals of each level by value: they are left out, as above.
    ours = dataclasses.replace(passed, score_proposals=lambda proposals: logits.clone().requires_grad_())
    theirs = SimpleNamespace(
        features=taught.features,
        backbone=taught.backbone,
        cell_logits=taught.cell_logits,
        samples=taught.samples,
        score_proposals=lambda proposals: logits[:1].expand(sum(map(len, proposals)), -1),
    )
    features = list(passed.features.values())
    with Waits() as waits, Named() as named:
        found = method.losses(ours, theirs, ORDINARY)
        total = torch.stack(list(found.values())).sum()
        gradients = torch.autograd.grad(total, features, retain_graph=True, allow_unused=True)
    assert any(one is not None for one in gradients)
    # What lies behind these maps is the student's own backward pass, whose cells are picked by value.
    assert waits.found == []
    assert not named.found & VALUE_READ


def test_the_neck_losss_own_backward_pass_waits_for_nothing(monkeypatch):
    """It is Python, so that it runs on fake tensors where autograd does not."""
    monkeypatch.setattr(losses, "kernels_for", lambda *_: None)
    with fake_cuda() as waits:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (torch.empty(2, 8, 5, 6, dtype=one, device="cuda") for one in (dtype, torch.float32))
            kinds = torch.empty(2, 5, 6, dtype=torch.uint8, device="cuda")
            context = SimpleNamespace(saved_tensors=(student, teacher, kinds))
            with Named() as named:
                gradient, *_ = _SquaredDifferences.backward(context, torch.empty(2, device="cuda"))
            assert (gradient.shape, gradient.dtype) == (student.shape, dtype)
            assert not named.found & VALUE_READ
    assert waits.found == []
