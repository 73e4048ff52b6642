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
# Large enough that every level has anchors that match, small enough for a hundred and fifty steps in seconds.
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
        changes: what replaces top-level keys of `examples/digits.yaml`.
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
    """Says how much of the program's time is left, counted from the start of its process, imports included."""

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
    """Where and how large everything is measured.

    Attributes:
        device: where.
        small: tiny sizes, which show that every part runs and nothing else.
        home: a directory for files.
        deadline: when all must be over.
    """

    device: torch.device
    small: bool
    home: Path
    deadline: Deadline

    @property
    def judged(self) -> bool:
        """Whether goals mean anything: on a GPU, at full size."""
        return self.device.type == "cuda" and not self.small

    @property
    def size(self) -> Size:
        """What a step is timed at."""
        return SMALL if self.small else replace(GPU, repeats=8)

    @property
    def sync_size(self) -> Size:
        """What a step is counted at."""
        return replace(SMALL, schedule={}) if self.small else SYNC

    @property
    def compiled_size(self) -> Size:
        """What compiled steps are taken at: a level of a single row or column would have a graph of its own."""
        return replace(self.size, height=256, width=384) if self.small else self.size

    @property
    def example(self) -> Example:
        """The digits example that runs are of."""
        return TINY if self.small else FULL


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a part has measured.

    Attributes:
        measured: the numbers, for JSON.
        goal: what they are held to, in words or numbers; None: nothing.
        met: whether they keep to it; None: there is nothing to keep to.
    """

    measured: Mapping[str, Any]
    goal: Any = None
    met: bool | None = None


class Skipped(Exception):
    """A part has nothing to measure here; says why."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to measure.

    Attributes:
        name: what it is called; the word before a colon is what `--parts` chooses by.
        seconds: what it takes on an H100, as estimated; with less time left it is not begun.
        work: measures. It may raise `Skipped`.
    """

    name: str
    seconds: float
    work: Callable[[Setting], Found]

    @property
    def group(self) -> str:
        """The word that `--parts` chooses by."""
        return self.name.split(":")[0]


def told(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    first = str(error).strip().split("\n", 1)[0][:300]
    return f"{type(error).__name__}: {first}"
