"""What a GPU must do as a CPU does, or what only a GPU can run out of. `make test-gpu`.

Each test takes the device; its CPU variant runs with all others, so that what stands here is known to run.
"""

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d, box_iou

from benchmarks.loss_kernel import peak_bytes
from defeat.engine import detectors
from defeat.engine.data.loading.loader import ImageReader
from defeat.engine.detectors.frozen_norm import FrozenBatchNorm
from defeat.engine.evaluation.evaluate import detect_split
from defeat.engine.numerics import numerics
from defeat.engine.report import RunError
from defeat.engine.training.ema import EMA
from tests.defeat.engine.detectors.test_frozen_norm import filled
from tests.defeat.engine.training.test_step import RETINANET, START, batch_of, step_for
from tests.support.training import CLASSES, TINY, shapes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALLEST_BLOCK = 512  # bytes, of torch's allocator


def fill(device):
    """Take all memory of a GPU that is left, to the last block, and return what holds it; on a CPU say that it is."""
    if device == "cpu":
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")
    torch.cuda.empty_cache()
    held, size = [], 2**32
    while size >= SMALLEST_BLOCK:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
    return held


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("detector", [RETINANET, TINY], ids=["retinanet", "faster_rcnn"])
def test_steps_are_those_in_float32_on_the_cpu(detector, precision, device):
    method = {"method": "fitnet"}
    cpu = step_for(detector, distillation=method, gradient_clip=0, precision="float32")
    other = step_for(
        detector, distillation=method, gradient_clip=0, precision=precision, channels_last=True, device=device
    )
    torch.manual_seed(1)
    expected = cpu(batch_of(4), START, measured=True).values
    torch.manual_seed(1)
    with numerics(torch.device(device), precision, shapes=1):
        taken = other(batch_of(4), START, measured=True, cancelled=True)
    found = taken.values
    assert taken.cancelled
    # Norms are not told of a step that overflows float16.
    left_out = {name for name in expected if name.endswith("gradient_norm") and name not in found}
    assert found.keys() == expected.keys() - left_out
    assert precision == "float16" or not left_out
    # The neck draws nothing; a sampler's numbers differ by device, and with them a two-stage head's losses.
    assert found["loss/neck"] == pytest.approx(expected["loss/neck"], rel=0.02)
    if detector is RETINANET:
        assert found["loss/total"] == pytest.approx(expected["loss/total"], rel=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_is_exhausted_in_the_passes_says_what_would_fit(device):
    step = step_for(TINY, batch_size=8, device=device)
    plain = step.losses.detector.forward_train

    def _train_pass(images, targets):
        if len(images) > 2:
            held = fill(device)  # as long as this frame lives, which the error's traceback holds
            held.append(torch.empty(2**20, dtype=torch.uint8, device=device))  # more than there is
        return plain(images, targets)

    step.losses.detector.forward_train = _train_pass
    with pytest.raises(RunError, match=r"2 at a time fit: that is accumulation 4 for") as raised:
        step(batch_of(8), START)
    assert raised.value.code == "out_of_memory"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_is_exhausted_by_the_optimisers_first_step_says_what_would_fit(device, optimizer):
    step = step_for(TINY, batch_size=6, optimizer=optimizer, device=device)
    plain = step.optimizer.step

    def _step():
        held = fill(device)
        try:
            return plain()
        finally:
            held.clear()

    step.optimizer.step = _step
    with pytest.raises(RunError, match=r"3 at a time fit: that is accumulation 2 for") as raised:
        step(batch_of(6), START)
    assert raised.value.code == "out_of_memory"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_batch_norm_is_that_of_float64_rounded_once(dtype, layout, device):
    generator = torch.Generator().manual_seed(2)
    x, pull = (torch.randn(2, 5, 4, 6, generator=generator).to(dtype).to(memory_format=layout) for _ in range(2))
    exact = x.double().requires_grad_()
    expected = filled(FrozenBatchNorm2d(5)).double()(exact)
    (expected_gradient,) = torch.autograd.grad(expected, exact, pull.double())
    norm, ours = filled(FrozenBatchNorm(5)).to(device), x.to(device).requires_grad_()
    found = norm(ours)
    (gradient,) = torch.autograd.grad(found, ours, pull.to(device))
    assert (found.dtype, gradient.dtype) == (dtype, dtype)
    assert found.is_contiguous(memory_format=layout)
    # Half a unit in the last place, and what float32 adds to it: a GPU's root is not the CPU's.
    tolerance = max(0.51 * torch.finfo(dtype).eps, 2e-6)
    for mine, other in ((found, expected), (gradient, expected_gradient)):
        torch.testing.assert_close(mine.double().cpu(), other, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_the_average_takes_the_weights_places_and_no_memory(device):
    module = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.BatchNorm2d(64)).to(device)
    average = EMA(module, decay=0.9)

    def _apply():
        with average.applied(module):
            pass
        average.update(module, step=1)

    _apply()  # what is made once
    if device == "cpu":
        assert peak_bytes(_apply) == 0
        return
    before = torch.cuda.memory_allocated()
    with average.applied(module):
        assert torch.cuda.memory_allocated() == before
    torch.cuda.reset_peak_memory_stats()
    with average.applied(module):
        pass
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("device", DEVICES)
def test_detections_are_those_on_the_cpu(device, tmp_path):
    dataset = shapes(tmp_path, train=1, val=6)
    reader = ImageReader(tmp_path / "canonical", dataset.in_split("val"))
    torch.manual_seed(0)
    detector = detectors.build(TINY, CLASSES)
    expected = detect_split(detector, reader, batch_size=4, device=torch.device("cpu"))
    found = detect_split(detector.to(device), reader, batch_size=4, device=torch.device(device))
    assert found.keys() == expected.keys()
    near = []
    for number, other in expected.items():
        mine = found[number]
        assert all(one.device.type == "cpu" for one in (mine["boxes"], mine["labels"], mine["scores"]))
        count = min(len(mine["scores"]), len(other["scores"]), 10)
        assert count == 10
        torch.testing.assert_close(mine["scores"][:count], other["scores"][:count], rtol=0, atol=2e-3)
        near += (box_iou(mine["boxes"][:count], other["boxes"]).max(dim=1).values > 0.95).tolist()
    # Of two boxes with nearly the same score either may suppress the other.
    assert sum(near) >= 0.9 * len(near)
