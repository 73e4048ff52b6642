"""DeFeat's neck loss with its masks, forward and backward, against the formula written down plainly; and its memory.

    python -m benchmarks.loss_kernel [--quick]

The plain form is the authors' way in float32: loops over boxes for the masks, which are repeated over the channels.
Both run in turn in one process, so that whatever else the machine does meets both. Memory is what torch's allocator
hands out while the loss and its gradient are made, as torch's profiler records it: the most that is in use at once,
beyond what was there before. The last line is one JSON object; the exit code is 1 if a goal is missed.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from worker.methods.losses import decoupled_feature_loss
from worker.methods.masks import cell_kinds, cells_inside, object_masks

SPEED_GOAL = 5.0  # times as fast as the plain form
MEMORY_GOAL = 1.3  # times the bytes of the student's pyramid
OBJECT_WEIGHT, BACKGROUND_WEIGHT = 4.0, 16.0
STRIDES = (4, 8, 16, 32, 64)
BASE_SIZE = 56.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """A batch: pictures of height x width px, with channels on each pyramid level, measured so many times."""

    pictures: int
    channels: int
    height: int
    width: int
    boxes: int
    repeats: int


FULL = Size(pictures=2, channels=256, height=800, width=1024, boxes=12, repeats=9)
QUICK = Size(pictures=1, channels=256, height=800, width=1024, boxes=12, repeats=7)


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
    """Return random maps and boxes of 8 px to the whole picture."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (size.pictures, size.channels, math.ceil(size.height / stride), math.ceil(size.width / stride))
        for stride in STRIDES
    ]
    limit = torch.tensor([size.width, size.height])
    boxes = []
    for _ in range(size.pictures):
        sides = 8 * (limit / 8) ** torch.rand(size.boxes, 2, generator=generator)
        corner = torch.rand(size.boxes, 2, generator=generator) * (limit - sides)
        boxes.append(torch.cat([corner, corner + sides], dim=1))
    return Case(
        student=[torch.randn(shape, generator=generator).requires_grad_() for shape in shapes],
        teacher=[torch.randn(shape, generator=generator) for shape in shapes],
        boxes=boxes,
        image=(size.height, size.width),
    )


def ours(case: Case) -> Tensor:
    """Return the weighted neck loss as DeFeat computes it here."""
    masks = object_masks(case.boxes, sizes=case.sizes, strides=STRIDES, base_size=BASE_SIZE)
    inside = cells_inside(
        [case.image] * len(case.boxes),
        padded=case.image,
        sizes=case.sizes,
        strides=STRIDES,
        device=case.student[0].device,
    )
    objects, background = decoupled_feature_loss(case.student, case.teacher, cell_kinds(masks, inside))
    return OBJECT_WEIGHT * objects + BACKGROUND_WEIGHT * background


def plain(case: Case) -> Tensor:
    """Return the same from the formula: masks by loops, as large as the features."""
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
    for picture, of_picture in enumerate(boxes):
        for x1, y1, x2, y2 in of_picture.tolist():
            fitting = math.floor(math.log2(math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / BASE_SIZE + 1e-6))
            if min(max(fitting, 0), len(STRIDES) - 1) != level:
                continue
            left, top, right, bottom = (int(value / STRIDES[level]) for value in (x1, y1, x2, y2))
            if left >= right or top >= bottom:
                mask[picture, min(top, height - 1), min(left, width - 1)] = 1
            else:
                mask[picture, top:bottom, left:right] = 1
    return mask[:, None].repeat(1, channels, 1, 1)


def with_gradient(loss: Callable[[Case], Tensor], case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and its gradients in the student's maps."""
    value = loss(case)
    return value.detach(), torch.autograd.grad(value, case.student)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that torch's allocator has handed out at once during `work`, beyond those before it."""
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
    """Return times in ms (medians), their ratio, and the memory of both forms in pyramids."""
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


def main(arguments: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_kernel", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one picture instead of two, and fewer repeats")
    size = QUICK if parser.parse_args(arguments).quick else FULL
    result = measure(size)
    print(json.dumps({"benchmark": "loss_kernel", **result}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
