"""What a training step compiles: the maps alone, once for each detector; and what becomes of a failed compilation."""

import copy
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch._dynamo.backends.common import aot_autograd

from defeat.engine import detectors
from defeat.engine.detectors import compilation
from defeat.engine.detectors.compilation import Compiled
from tests.support.one_stage import FCOS, RETINANET
from tests.support.ssd import SSD, SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

MOBILENET = {"architecture": "faster_rcnn_mobilenet", "pyramid_channels": 16, "min_size": 64, "max_size": 96}
MASK = {**TINY, "architecture": "mask_rcnn", "mask_channels": 8}
# The first is square: its two sides must not be taken for one.
SHAPES = [(128, 128), (128, 192), (192, 128), (160, 128), (128, 224)]


class Counting:
    """A backend that runs a graph as it is, and counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _a_compiler_that_knows_nothing():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counting(monkeypatch):
    backend = Counting()
    monkeypatch.setattr(compilation, "BACKEND", backend)
    return backend


def build(spec: dict[str, Any], **changes: Any) -> detectors.Detector:
    torch.manual_seed(0)
    return detectors.build({**spec, **changes}, CLASSES).train()


def eager(spec: dict[str, Any]) -> detectors.Detector:
    """Return a detector whose compilation has failed before: of the same memory layout, and never compiled."""
    detector = build(spec)
    detector.compile_trunk()
    for one in detector._compiled:
        one.failure = "failed before"
    return detector


def random_images(shape: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("spec", "half"),
    [
        ({**TINY, "frozen_batch_norm": True}, True),
        (RETINANET, False),
        pytest.param({**RETINANET, "backbone": "torchvision/resnet18"}, True, marks=pytest.mark.slow),
        pytest.param(FCOS, True, marks=pytest.mark.slow),
        pytest.param(MASK, True, marks=pytest.mark.slow),
    ],
)
def test_teacher_and_student_compile_once_each(spec, half, counting):
    student = build(spec, min_size=128, max_size=224)
    teacher = build(spec, min_size=128, max_size=224).eval().requires_grad_(False)
    for one in (student, teacher):
        one.compile_trunk()

    def _evaluate() -> None:
        before, mode = counting.graphs, student.training
        for one in (student, teacher):
            one.eval().detect(images_and_targets()[0])
            one.features(random_images((64, 96), 1))
        student.train(mode)
        assert counting.graphs == before

    seen = []
    _evaluate()
    for height, width in SHAPES:
        _, targets = images_and_targets(2)
        images = [torch.rand(3, height, width) for _ in targets]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            passed = student.forward_train(images, targets)
            with torch.no_grad():
                taught = teacher.maps(passed.images)
            loss = sum(passed.losses.values()) + sum(
                (mine.float() - other.float()).square().mean()
                for mine, other in zip(passed.features.values(), taught.features.values(), strict=True)
            )
        loss.backward()
        seen.append(passed.images.shape[2:])
        _evaluate()
    assert len(set(seen)) == len(SHAPES)
    assert counting.graphs == 4  # body and pyramid of each
    assert (student.compilation_failure, teacher.compilation_failure) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"frozen_batch_norm": True, "pyramid_batch_norm": True}])
def test_inductor_compiles_once_too(changes):
    """It has reasons of its own to compile for one height and width alone."""
    detector = build(TINY, backbone="timm/resnet10t", **changes)
    detector.compile_trunk()
    torch._dynamo.utils.counters.clear()
    with torch._functorch.config.patch(donated_buffer=False):
        for shape in SHAPES:
            with torch.autocast("cpu", torch.bfloat16):
                maps = detector.maps(random_images(shape))
            sum(one.float().square().mean() for one in maps.features.values()).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert detector.compilation_failure is None


@pytest.mark.slow
@pytest.mark.parametrize("spec", [MOBILENET, SSD, SSDLITE])
@pytest.mark.usefixtures("narrow_vgg")
def test_families_without_a_pyramid_of_ours_compile_once(spec, counting):
    plain, compiled = eager(spec), build(spec)
    names = list(compiled.state_dict())
    compiled.compile_trunk()
    shapes = [compiled.fixed_size] if compiled.fixed_size else SHAPES
    for shape in shapes * 2:
        expected, found = plain.maps(random_images(shape)), compiled.maps(random_images(shape))
        assert found.backbone is None
        assert list(found.features) == list(expected.features)
        for name, one in expected.features.items():
            torch.testing.assert_close(found.features[name], one)
    assert counting.graphs == 1
    assert compiled.compilation_failure is None
    assert list(compiled.state_dict()) == names


def test_only_the_training_pass_is_compiled(monkeypatch):
    detector = build(TINY)
    names = list(detector.state_dict())
    detector.compile_trunk()
    assert list(detector.state_dict()) == names

    def _refuse(*_: Any) -> None:
        raise AssertionError("called compiled")

    monkeypatch.setattr(Compiled, "__call__", _refuse)
    images, targets = images_and_targets()
    detector.features(random_images((64, 64)))
    detector(images, targets)
    detector.eval().detect(images)
    with pytest.raises(AssertionError, match="called compiled"):
        detector.maps(random_images((64, 64)))


def test_gradients_lead_through_the_graphs_as_without_them(monkeypatch):
    """As in a step that measures: from the pyramid's maps to the backbone's, more than once; then to all parameters."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    plain, compiled = eager(RETINANET), build(RETINANET)
    compiled.compile_trunk()
    # What the backbone's finer maps add to its coarser ones lies inside its graph, and is not seen in it.
    stages = plain.backbone.body(compilation._ordered(random_images((128, 96))))
    leaves = {name: one.detach().requires_grad_() for name, one in stages.items()}
    plain.load_state_dict(compiled.state_dict())
    found = []
    with torch._functorch.config.patch(donated_buffer=False):
        for detector in (plain, compiled):
            maps = detector.maps(random_images((128, 96)))
            features, inner = maps.features, list(maps.backbone.values())
            if detector is plain:
                features, inner = plain.backbone.fpn(leaves), list(leaves.values())
            losses = [one.square().mean() for one in features.values()]
            pulls = [torch.autograd.grad(one, inner, retain_graph=True, allow_unused=True) for one in losses]
            sum(one.square().mean() for one in maps.features.values()).backward()
            found.append([one for pull in pulls for one in pull] + [one.grad for one in detector.backbone.parameters()])
    assert compiled.compilation_failure is None
    expected, ours = found
    assert sum(one is not None for one in expected) > len(expected) / 2
    for mine, other in zip(ours, expected, strict=True):
        if (one := mine if other is None else other) is not None:  # a graph may give zeros for a gradient that is none
            sides = [torch.zeros_like(one) if side is None else side for side in (mine, other)]
            torch.testing.assert_close(*sides, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_copy_compiles_itself(counting):
    detector = build(TINY)
    detector.compile_trunk()
    detector.maps(random_images((64, 96)))
    other = copy.deepcopy(detector)
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.zero_()
    assert all(one.abs().sum() == 0 for one in other.maps(random_images((64, 96))).features.values())
    assert counting.graphs == 4
    assert any(one.abs().sum() > 0 for one in detector.maps(random_images((64, 96))).features.values())


def _raise(*_: Any) -> None:
    raise ValueError("no kernel for this\n/some/where/else.py")


def fails_later(after: int) -> Any:
    counting = Counting()

    def _backend(graph: Any, examples: Any) -> Any:
        return counting(graph, examples) if counting.graphs < after else _raise()

    return _backend


@pytest.mark.parametrize(
    ("backend", "limit", "says"),
    [
        (_raise, 8, "ValueError: no kernel for this"),
        (fails_later(1), 8, "ValueError: no kernel for this"),
        (aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=_raise), 8, "ValueError: no kernel"),
        (Counting(), 1, "recompile limit exceeded"),
    ],
    ids=["at once", "later", "backward", "limit"],
)
def test_a_failed_compilation_is_told_and_the_step_goes_on(backend, limit, says, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", backend)
    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", limit)
    plain, compiled = eager(RETINANET), build(RETINANET)
    compiled.compile_trunk()
    for precision in (torch.float32, torch.bfloat16, torch.float32):
        found = []
        for detector in (plain, compiled):
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                losses = detector.forward_train(*images_and_targets()).losses
            detector.zero_grad()
            sum(losses.values()).backward()
            found.append([*losses.values(), *(one.grad for one in detector.parameters())])
        assert all(map(torch.equal, *found)), precision
        assert all(map(torch.equal, plain.buffers(), compiled.buffers()))
    failure = compiled.compilation_failure
    assert says in failure
    assert "\n" not in failure
    assert "/" not in failure


def test_errors_of_the_computation_are_not_the_compilers(monkeypatch):
    module = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(RuntimeError) as expected:
        module(torch.zeros(1, 5, 8, 8))
    monkeypatch.setattr(compilation, "BACKEND", Counting())
    compiled = Compiled(module, dynamic=True)
    with pytest.raises(RuntimeError) as caught:
        compiled(torch.zeros(1, 5, 8, 8))
    assert (type(caught.value), str(caught.value)) == (type(expected.value), str(expected.value))
    assert caught.value.__context__ is None
    assert compiled.failure is None


def test_memory_that_runs_out_in_a_graph_is_told_as_that(monkeypatch):
    def _exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(compilation, "BACKEND", lambda _graph, _examples: _exhausted)
    compiled = Compiled(torch.nn.Conv2d(3, 4, 3), dynamic=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
        compiled(torch.zeros(1, 3, 8, 8))
    assert compiled.failure is None
