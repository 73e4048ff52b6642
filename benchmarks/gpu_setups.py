"""What the parts of `benchmarks.gpu` share: the deadline, the device, the sizes, and what a part hands back."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks.step_time import GPU, Size
from defeat.engine.training.distill import SERVICE_KEYS

ROOT = Path(__file__).resolve().parents[1]
TINY_DETECTOR = "timm/mobilenetv3_small_050"
# Large enough that anchors of every level match, small enough for 150 steps in seconds.
SYNC = Size(
    teacher="torchvision/resnet18",
    student="torchvision/resnet18",
    images=4,
    height=256,
    width=320,
    detector={},
    two_stage={},
    schedule={},
    repeats=1,
)
SMALL = Size(
    teacher=TINY_DETECTOR,
    student=TINY_DETECTOR,
    images=2,
    height=64,
    width=96,
    detector={"pyramid_channels": 16},
    two_stage={"box_samples": 16, "train_proposals": 64, "test_proposals": 32, "head_channels": 32},
    schedule={"precision": "bfloat16", "channels_last": True},
    repeats=1,
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """The digits example at one size.

    Attributes:
        train, val: scenes of each split.
        changes: replacements of top-level keys of `examples/digits.yaml`.
    """

    train: int
    val: int
    changes: Mapping[str, Any]

    def spec(self, *, seed: int) -> dict[str, Any]:
        """Return the job's spec, as a run reads it."""
        job = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
        return {key: value for key, value in job.items() if key not in SERVICE_KEYS} | {**self.changes, "seed": seed}


_TINY = {
    "architecture": "faster_rcnn",
    "backbone": "timm/mobilenetv3_small_050",
    "strides": [8, 16],
    "pool_level": False,
    "pyramid_channels": 16,
    "anchor_scale": 3,
    "min_size": 64,
    "max_size": 80,
    "head_channels": 32,
    "train_proposals": 64,
    "test_proposals": 32,
    "box_samples": 32,
}
_TINY_SCHEDULE = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2}
# As `make demo` has it.
FULL = Example(train=400, val=60, changes={})
TINY = Example(
    train=8,
    val=4,
    changes={
        "teacher": {"source": "train", "detector": _TINY, "schedule": _TINY_SCHEDULE},
        "student": {"detector": _TINY},
        "schedule": _TINY_SCHEDULE,
    },
)


class Deadline:
    """How much of the program's time is left, counted from the start of its process, imports included."""

    def __init__(self, minutes: float, *, started: float | None = None) -> None:
        """Begin; `started` is the second of the epoch from which the minutes count, None: the process's start."""
        self._started = psutil.Process().create_time() if started is None else started
        self._seconds = 60 * minutes

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.time() - self._started

    @property
    def left(self) -> float:
        """Seconds until the end; below 0 after it."""
        return self._seconds - self.spent


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The device and the sizes of all measurements.

    Attributes:
        device: the device to measure.
        small: tiny sizes, which only test that every part runs.
        home: a directory for files.
        deadline: when all must be over.
    """

    device: torch.device
    small: bool
    home: Path
    deadline: Deadline

    @property
    def judged(self) -> bool:
        """Whether goals apply: on a GPU, at full size."""
        return self.device.type == "cuda" and not self.small

    @property
    def size(self) -> Size:
        """The size of timed steps."""
        return SMALL if self.small else replace(GPU, repeats=8)

    @property
    def sync_size(self) -> Size:
        """The size of steps whose waits are counted."""
        return replace(SMALL, schedule={}) if self.small else SYNC

    @property
    def compiled_size(self) -> Size:
        """The size of compiled steps: a level of a single row or column would have its own graph."""
        return replace(self.size, height=256, width=384) if self.small else self.size

    @property
    def example(self) -> Example:
        """The size of the digits example."""
        return TINY if self.small else FULL


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a part.

    Attributes:
        measured: the numbers, for JSON.
        goal: their goal, in words or numbers; None: there is none.
        met: whether they meet it; None: there is none.
    """

    measured: Mapping[str, Any]
    goal: Any = None
    met: bool | None = None


class Skipped(Exception):
    """A part has nothing to measure here; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to measure.

    Attributes:
        name: its name; the word before a colon is its group, which `--parts` selects.
        seconds: its estimated time on an H100; with less time left it is not started.
        work: takes the measurement; may raise `Skipped`.
    """

    name: str
    seconds: float
    work: Callable[[Setting], Found]

    @property
    def group(self) -> str:
        """The word that `--parts` selects it by."""
        return self.name.split(":")[0]


def error_line(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    first = str(error).strip().split("\n", 1)[0][:300]
    return f"{type(error).__name__}: {first}"
