"""DeFeat's neck loss with its masks, forward and backward: time and memory against a plain implementation.

    python -m benchmarks.loss_kernel [--quick] [--device cuda]

The plain form follows the authors' code in float32: loops over boxes for the masks, which are repeated over the
channels. Both run in turn in one process, so that other load on the machine affects both. Memory is the peak that
torch's allocator holds, as torch's profiler records it, while the loss and its gradient are computed, beyond what it
held before. The last line is one JSON object; the exit code is 1 if a goal is missed.

On a GPU the masks are made beforehand, and only the loss and its gradient are timed, in three forms: the kernel, block
by block, and plain. Their share of the card's memory bandwidth counts the necessary transfers: both maps for the value,
and both maps and the gradient for the gradient. The bandwidth is that of a copy of a large tensor in the same run. The
exit code is 1 if the kernel was not used, or its result differs from that of the block-wise form.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from defeat.engine.methods import losses
from defeat.engine.methods.losses import decoupled_feature_loss
from defeat.engine.methods.masks import BACKGROUND, OBJECT, cell_kinds, cells_inside, object_masks

SPEED_GOAL = 5.0  # times as fast as the plain form
MEMORY_GOAL = 1.3  # times the bytes of the student's pyramid
OBJECT_WEIGHT, BACKGROUND_WEIGHT = 4.0, 16.0
STRIDES = (4, 8, 16, 32, 64)
BASE_SIZE = 56.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """A batch of images of height x width px with channels on each pyramid level; how often it is measured."""

    images: int
    channels: int
    height: int
    width: int
    boxes: int
    repeats: int


FULL = Size(images=2, channels=256, height=800, width=1024, boxes=12, repeats=9)
QUICK = Size(images=1, channels=256, height=800, width=1024, boxes=12, repeats=7)
CARD = Size(images=8, channels=256, height=800, width=1024, boxes=12, repeats=9)
QUICK_CARD = Size(images=2, channels=256, height=800, width=1024, boxes=12, repeats=5)
COPIED_BYTES = 2**30
CALLS = 10  # per timing: a GPU works asynchronously
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Adapted maps of the student, maps of the teacher, boxes (N, 4) in px, and the size of each image in px."""

    student: list[Tensor]
    teacher: list[Tensor]
    boxes: list[Tensor]
    image: tuple[int, int]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each level."""
        return [(level.shape[-2], level.shape[-1]) for level in self.student]

    @property
    def pyramid_bytes(self) -> int:
        """Bytes of the student's maps."""
        return sum(level.nbytes for level in self.student)


def make_case(size: Size, *, seed: int = 0) -> Case:
    """Return random maps and boxes of 8 px to the whole image."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (size.images, size.channels, math.ceil(size.height / stride), math.ceil(size.width / stride))
        for stride in STRIDES
    ]
    limit = torch.tensor([size.width, size.height])
    boxes = []
    for _ in range(size.images):
        sides = 8 * (limit / 8) ** torch.rand(size.boxes, 2, generator=generator)
        corner = torch.rand(size.boxes, 2, generator=generator) * (limit - sides)
        boxes.append(torch.cat([corner, corner + sides], dim=1))
    return Case(
        student=[torch.randn(shape, generator=generator).requires_grad_() for shape in shapes],
        teacher=[torch.randn(shape, generator=generator) for shape in shapes],
        boxes=boxes,
        image=(size.height, size.width),
    )


def kinds_of(case: Case) -> list[Tensor]:
    """Return DeFeat's kind of each cell: object, background or padding."""
    masks = object_masks(case.boxes, sizes=case.sizes, strides=STRIDES, base_size=BASE_SIZE)
    inside = cells_inside(
        [case.image] * len(case.boxes),
        padded=case.image,
        sizes=case.sizes,
        strides=STRIDES,
        device=case.student[0].device,
    )
    return cell_kinds(masks, inside)


def ours(case: Case) -> Tensor:
    """Return the weighted neck loss of the engine's DeFeat, masks included."""
    return weighted(case, kinds_of(case))


def weighted(case: Case, kinds: Sequence[Tensor]) -> Tensor:
    """Return the weighted neck loss from the kinds of the cells."""
    objects, background = decoupled_feature_loss(case.student, case.teacher, kinds)
    return OBJECT_WEIGHT * objects + BACKGROUND_WEIGHT * background


def plain(case: Case) -> Tensor:
    """Return the weighted neck loss in plain form: masks by loops, as large as the features."""
    levels = []
    for index, (student, teacher) in enumerate(zip(case.student, case.teacher, strict=True)):
        mask = _plain_mask(case.boxes, index, student)
        difference = (student - teacher) ** 2
        objects = (mask * difference).sum() / max(1.0, 2 * mask.sum().item())
        background = ((1 - mask) * difference).sum() / max(1.0, 2 * (1 - mask).sum().item())
        levels.append(OBJECT_WEIGHT * objects + BACKGROUND_WEIGHT * background)
    return sum(levels, torch.zeros(())) / len(levels)


def _plain_mask(boxes: Sequence[Tensor], level: int, features: Tensor) -> Tensor:
    batch, channels, height, width = features.shape
    mask = torch.zeros(batch, height, width)
    for image, of_image in enumerate(boxes):
        for x1, y1, x2, y2 in of_image.tolist():
            fitting = math.floor(math.log2(math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / BASE_SIZE + 1e-6))
            if min(max(fitting, 0), len(STRIDES) - 1) != level:
                continue
            left, top, right, bottom = (int(value / STRIDES[level]) for value in (x1, y1, x2, y2))
            if left >= right or top >= bottom:
                mask[image, min(top, height - 1), min(left, width - 1)] = 1
            else:
                mask[image, top:bottom, left:right] = 1
    return mask[:, None].repeat(1, channels, 1, 1)


def with_gradient(loss: Callable[[Case], Tensor], case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and its gradients in the student's maps."""
    value = loss(case)
    return value.detach(), torch.autograd.grad(value, case.student)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak bytes that torch's allocator holds during `work`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    changes = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def measure(size: Size) -> dict[str, object]:
    """Return median times in ms, their ratio, and the memory of both forms in multiples of the pyramid's."""
    case = make_case(size)
    forms = {"ours": ours, "plain": plain}
    values = {name: with_gradient(loss, case) for name, loss in forms.items()}  # and a warm-up
    pairs = zip(values["ours"][1], values["plain"][1], strict=True)
    apart = max(((mine - other).norm() / other.norm()).item() for mine, other in pairs)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(size.repeats):
        for name, loss in forms.items():
            start = time.perf_counter()
            with_gradient(loss, case)
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    memory = {
        name: peak_bytes(lambda loss=loss: with_gradient(loss, case)) / case.pyramid_bytes  # type: ignore[misc]
        for name, loss in forms.items()
    }
    ratio = medians["plain"] / medians["ours"]
    return {
        "ratio": round(ratio, 2),
        "goal": SPEED_GOAL,
        "memory_ratio": round(memory["ours"], 3),
        "memory_goal": MEMORY_GOAL,
        "ok": ratio >= SPEED_GOAL and memory["ours"] <= MEMORY_GOAL and apart <= 1e-5,
        "milliseconds": {name: round(median, 2) for name, median in medians.items()},
        "plain_memory_ratio": round(memory["plain"], 3),
        "gradient_difference": apart,
        "pyramid_bytes": case.pyramid_bytes,
        "repeats": size.repeats,
        "threads": torch.get_num_threads(),
    }


def plainly_weighted(case: Case, kinds: Sequence[Tensor]) -> Tensor:
    """Return the weighted neck loss in plain form, with masks as large as the features."""
    levels = []
    for student, teacher, cells in zip(case.student, case.teacher, kinds, strict=True):
        difference = (student.float() - teacher.float()) ** 2
        level = torch.zeros((), device=student.device)
        for kind, weight in ((OBJECT, OBJECT_WEIGHT), (BACKGROUND, BACKGROUND_WEIGHT)):
            mask = (cells == kind)[:, None].repeat(1, student.shape[1], 1, 1).float()
            level = level + weight * (mask * difference).sum() / (2 * mask.sum()).clamp(min=1.0)
        levels.append(level)
    return torch.stack(levels).mean()


def on_device(case: Case, device: torch.device, dtype: torch.dtype, layout: str) -> Case:
    """Return the case with maps of this dtype and memory format on a device."""
    student, teacher = (
        [one.detach().to(device, dtype, memory_format=LAYOUTS[layout]) for one in maps]
        for maps in (case.student, case.teacher)
    )
    boxes = [one.to(device) for one in case.boxes]
    return replace(case, student=[one.requires_grad_() for one in student], teacher=teacher, boxes=boxes)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long one call of `work` takes, averaged over `CALLS` in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / CALLS


def copy_bandwidth(device: torch.device, copied_bytes: int, repeats: int) -> float:
    """Return the bytes per second that are read and written when a tensor is copied within the device's memory."""
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * copied_bytes / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(repeats))


def measure_maps(case: Case, kinds: Sequence[Tensor], bandwidth: float, repeats: int) -> dict[str, object]:
    """Return the three forms' times in ms (medians), their shares of the bandwidth, and whether the first two agree."""
    device = case.student[0].device
    forms: dict[str, Callable[[Case], Tensor]] = {
        "kernel": lambda one: weighted(one, kinds),
        "blocks": lambda one: weighted(one, kinds),
        "plain": lambda one: plainly_weighted(one, kinds),
    }

    def run(name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        block_wise = mock.patch.object(losses, "kernels_for", return_value=None)
        with block_wise if name == "blocks" else nullcontext():
            return with_gradient(forms[name], case)

    found = {name: run(name) for name in forms}  # and a warm-up
    pairs = zip(found["kernel"][1], found["blocks"][1], strict=True)
    apart = max(((mine.float() - other.float()).norm() / other.float().norm()).item() for mine, other in pairs)
    value_apart = {name: abs(value.item() / found["blocks"][0].item() - 1) for name, (value, _) in found.items()}
    del found, pairs
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name in forms:
            times[name].append(seconds(lambda name=name: run(name), device))  # type: ignore[misc]
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    # Both maps for the value; both, and the gradient, for the gradient.
    moved = sum(3 * ours.nbytes + 2 * theirs.nbytes for ours, theirs in zip(case.student, case.teacher, strict=True))
    used = all(losses.kernels_for(*level) is not None for level in zip(case.student, case.teacher, strict=True))
    return {
        "milliseconds": {name: round(1000 * median, 3) for name, median in medians.items()},
        "bandwidth_share": {name: round(moved / median / bandwidth, 3) for name, median in medians.items()},
        "moved_bytes": moved,
        "value_difference": value_apart,
        "gradient_difference": apart,
        "kernel_used": used,
        "ok": used and apart <= 1e-5 and value_apart["kernel"] <= 1e-5,
    }


def measure_device(size: Size, device: torch.device, *, copied_bytes: int) -> dict[str, object]:
    """Return the times of the three forms on a device, for the dtypes and memory formats of training.

    Each is measured on the whole pyramid and on its finest level.

    Args:
        size: the batch.
        device: a GPU; a CPU rehearses it, with the block-wise form in the kernel's place.
        copied_bytes: size of the tensor whose copy gives the bandwidth.
    """
    bandwidth = copy_bandwidth(device, copied_bytes, size.repeats)
    case, cases = make_case(size), []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            maps = on_device(case, device, dtype, layout)
            kinds = kinds_of(maps)
            for levels in (len(STRIDES), 1):
                some = replace(maps, student=maps.student[:levels], teacher=maps.teacher[:levels])
                found = measure_maps(some, kinds[:levels], bandwidth, size.repeats)
                cases.append({"dtype": str(dtype), "layout": layout, "levels": levels, **found})
    return {
        "ok": all(one["ok"] for one in cases),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "copy_bytes_per_second": round(bandwidth),
        "images": size.images,
        "repeats": size.repeats,
        "cases": cases,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_kernel", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images, and fewer repeats")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args(arguments)
    if given.device == "cuda":
        size = QUICK_CARD if given.quick else CARD
        result = measure_device(size, torch.device("cuda", 0), copied_bytes=COPIED_BYTES)
    else:
        result = measure(QUICK if given.quick else FULL)
    print(json.dumps({"benchmark": "loss_kernel", **result}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
