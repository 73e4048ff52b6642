"""DeFeat's training step against its lower bound: the teacher's trunk forward, and the plain student's training step.

    python -m benchmarks.step_time [--quick] [--device cuda] [--precision P] [--channels-last] [--compile]
                                   [--frozen-batch-norm]

Both run in turn in one process on the same batch, and their medians are compared. DeFeat's time is that of the
engine's own step, with the update of the weights, plus the average cost of the steps that measure gradients (one in
`MEASURE_EVERY`). Both run inside the engine's `numerics`, as in the training loop: cuDNN searches the fastest
algorithms for the batch's only shape. On a GPU the sizes are the paper's: ResNet-152 to ResNet-50, 8 images of
800x1333, bfloat16, channels_last. The last line is one JSON object; the exit code is 1 if a goal is missed.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defeat.engine import detectors, methods
from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.resize import disable_training_resize
from defeat.engine.detectors import Detector, Target
from defeat.engine.methods.balance import MEASURE_EVERY
from defeat.engine.methods.base import StepInfo
from defeat.engine.numerics import PRECISIONS, numerics
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.process_group import ProcessGroup
from defeat.engine.training.step import Step

CLASSES = [f"class {number}" for number in range(80)]
CLOCK = StepInfo(step=100, steps=1000, epoch=0, epochs=1)
WARM_UP = 2
NECK_ONLY = {"head_object_weight": 0, "head_background_weight": 0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: a family, DeFeat's parameters, and the maximum ratio to the lower bound."""

    architecture: str
    parameters: Mapping[str, Any]
    goal: float


CASES = {
    "retinanet": Case(architecture="retinanet", parameters=NECK_ONLY, goal=1.05),
    "faster_rcnn, student's proposals": Case(
        architecture="faster_rcnn", parameters={"proposals": "student"}, goal=1.05
    ),
    "faster_rcnn, teacher's proposals": Case(
        architecture="faster_rcnn", parameters={"proposals": "teacher"}, goal=1.20
    ),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """The batch (`images` of height x width px), the two backbones, and further keys of detectors and schedule."""

    teacher: str
    student: str
    images: int
    height: int
    width: int
    detector: Mapping[str, Any]
    two_stage: Mapping[str, Any]
    schedule: Mapping[str, Any]
    repeats: int

    def varied(self, *, frozen_batch_norm: bool | None = None, **schedule: Any) -> "Size":
        """Return this size with changed schedule keys, and with frozen batch norm or without; None: unchanged."""
        changed = {name: value for name, value in schedule.items() if value is not None}
        frozen = {} if frozen_batch_norm is None else {"frozen_batch_norm": frozen_batch_norm}
        return dataclasses.replace(self, schedule={**self.schedule, **changed}, detector={**self.detector, **frozen})


GPU = Size(
    teacher="torchvision/resnet152",
    student="torchvision/resnet50",
    images=8,
    height=800,
    width=1333,
    detector={},
    two_stage={},
    schedule={"precision": "bfloat16", "channels_last": True},
    repeats=30,
)
CPU = Size(
    teacher="torchvision/resnet50",
    student="torchvision/resnet18",
    images=2,
    height=192,
    width=256,
    # Like the examples for a CPU: narrow pyramids, and as many proposals per image area as in the paper.
    detector={"pyramid_channels": 64},
    two_stage={"box_samples": 32, "train_proposals": 200, "test_proposals": 100},
    schedule={},
    repeats=15,
)


def make_batch(size: Size) -> Batch:
    """Return random images with ten boxes each."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(size.images):
        images.append(torch.randint(0, 256, (3, size.height, size.width), generator=generator, dtype=torch.uint8))
        corner = torch.rand(10, 2, generator=generator) * torch.tensor([size.width, size.height]) * 0.6
        extent = 10 + torch.rand(10, 2, generator=generator) * torch.tensor([size.width, size.height]) * 0.35
        labels = torch.randint(1, len(CLASSES) + 1, (10,), generator=generator)
        targets.append(Target(boxes=torch.cat([corner, corner + extent], dim=1), labels=labels))
    return Batch.of(list(zip(images, targets, strict=True)))


class Bench:
    """A student that is trained with DeFeat, and the same student alone beside the teacher's trunk.

    Attributes:
        batch: the batch of all steps; on the device, as in the training loop.
        ours: takes DeFeat's step.
        plain: takes the step of the student alone.
    """

    def __init__(self, case: Case, size: Size, device: torch.device) -> None:
        self.device = device
        self.schedule = ScheduleConfig(**size.schedule)
        self.batch = make_batch(size).to(device)
        teacher = build(case, size, size.teacher, device).eval().requires_grad_(False)
        self.ours = make_step(
            build(case, size, size.student, device), teacher, {"method": "defeat", **case.parameters}, size
        )
        self.plain = make_step(build(case, size, size.student, device), None, {"method": "baseline"}, size)
        self.teacher = teacher
        self.seen: Tensor = teacher.transform(self.batch.floats())[0].tensors

    def defeat(self) -> None:
        """Take DeFeat's step."""
        self.ours(self.batch, CLOCK)

    def measured(self) -> None:
        """Take DeFeat's step and measure the gradient of each part."""
        self.ours(self.batch, CLOCK, measured=True)

    def bound(self) -> None:
        """Run the teacher's trunk, and take the plain step."""
        with torch.no_grad(), self._autocast():
            self.teacher.maps(self.seen)
        self.plain(self.batch, CLOCK)

    def numerics(self) -> AbstractContextManager[None]:
        """Return the context in which steps run: the schedule's precision, for batches of one shape."""
        return numerics(self.device, self.schedule.precision, shapes=1)

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = PRECISIONS[self.schedule.precision]
        return torch.autocast(self.device.type, precision, enabled=precision != torch.float32)


def build(case: Case, size: Size, backbone: str, device: torch.device) -> Detector:
    """Return a detector of the case's family on this backbone, with random weights."""
    torch.manual_seed(0)
    spec = {
        "architecture": case.architecture,
        "backbone": backbone,
        "min_size": min(size.height, size.width),
        "max_size": max(size.height, size.width),
        **size.detector,
        **(size.two_stage if case.architecture == "faster_rcnn" else {}),
    }
    return detectors.build(spec, CLASSES).to(device)


def make_step(student: Detector, teacher: Detector | None, distillation: Mapping[str, Any], size: Size) -> Step:
    """Return the engine's step. It disables the student's own resizing, as a training does: its loader resizes."""
    device = next(student.parameters()).device
    disable_training_resize(student)
    method = methods.build(distillation, student, teacher).to(device)
    # A learning rate that changes nothing: with random weights and images a real one would soon diverge.
    schedule = ScheduleConfig(learning_rate=1e-9, warmup_steps=0, batch_size=size.images, **size.schedule)
    step = Step(student, method=method, teacher=teacher, schedule=schedule, group=ProcessGroup(), device=device)
    step.losses.train()
    return step


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return how long `work` takes, including its work on the device."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def timed(works: Mapping[str, Callable[[], None]], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Return the median seconds of each of `works`, which run in turn `repeats` times after `WARM_UP` unmeasured turns.

    In each turn all of them start from the same seed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + WARM_UP):
        for name, work in works.items():
            torch.manual_seed(repeat)
            taken = seconds(work, device)
            if repeat >= WARM_UP:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def compare(bench: Bench, goal: float, *, repeats: int) -> dict[str, Any]:
    """Return the ratio of both medians, and the cost of measured steps in it."""
    works = {"defeat": bench.defeat, "bound": bench.bound, "measured": bench.measured}
    with bench.numerics():
        medians = timed(works, bench.device, repeats=repeats)
    measuring = max(0.0, medians["measured"] - medians["defeat"]) / MEASURE_EVERY
    ratio = (medians["defeat"] + measuring) / medians["bound"]
    return {
        "ratio": round(ratio, 4),
        "goal": goal,
        "ok": ratio <= goal,
        "measuring": round(measuring / medians["bound"], 4),
        "milliseconds": {name: round(1000 * median, 1) for name, median in medians.items()},
    }


def _sized(arguments: argparse.Namespace) -> Size:
    size = GPU if arguments.device == "cuda" else CPU
    changes: dict[str, Any] = {}
    if arguments.quick:
        changes["repeats"] = max(5, size.repeats // 5)
    if arguments.channels:
        changes["detector"] = {**size.detector, "pyramid_channels": arguments.channels}
    return dataclasses.replace(size, **changes).varied(
        frozen_batch_norm=arguments.frozen_batch_norm,
        precision=arguments.precision,
        channels_last=arguments.channels_last,
        compile=arguments.compile,
    )


def _cases(size: Size, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, case in CASES.items():
        result = compare(Bench(case, size, device), case.goal, repeats=size.repeats)
        print(f"{name}: {json.dumps(result)}", flush=True)
        yield name, result


def main(arguments: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the repeats")
    parser.add_argument("--channels", type=int, help="channels of the pyramids, instead of the size's own")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="instead of the size's own")
    for name in ("channels-last", "compile", "frozen-batch-norm"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help="instead of the size's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    size, device = _sized(given), torch.device(given.device)
    cases = dict(_cases(size, device))
    worst = max(cases.values(), key=lambda result: result["ratio"] / result["goal"])
    summary = {
        "benchmark": "step_time",
        "ratio": worst["ratio"],
        "goal": worst["goal"],
        "ok": all(result["ok"] for result in cases.values()),
        "cases": cases,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "size": vars(size),
    }
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
