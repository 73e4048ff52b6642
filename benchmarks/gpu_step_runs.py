"""The parts of `benchmarks.gpu` that take single steps: synchronisations, speed and memory."""

import gc
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_setups import Found, Part, Setting, error_line
from benchmarks.loss_kernel import peak_bytes
from benchmarks.step_time import (
    CASES,
    CLOCK,
    NECK_ONLY,
    Bench,
    Case,
    Size,
    build,
    compare,
    make_batch,
    make_step,
    timed,
)
from defeat.engine.data.loading.batch import Batch
from defeat.engine.methods import METHODS
from defeat.engine.methods.base import StepInfo
from defeat.engine.numerics import PRECISIONS, Precision, numerics
from defeat.engine.training.step import Step

FAMILIES = ("retinanet", "faster_rcnn")
HALF_GOAL = 1.6  # bfloat16 with channels_last over tf32, by the speed of a step
STUDENTS = "faster_rcnn, student's proposals"

# ---- what makes the CPU wait ----

# In torch's warning of each, under `torch.cuda.set_sync_debug_mode("warn")`.
_WAITS = "called a synchronizing CUDA operation"
# The owner of an operation, by the innermost of these folders in its Python stack.
_PLACES = {
    "defeat/engine/methods/": "method",
    "defeat/engine/detectors/": "detector",
    "torchvision/": "detector",
    "defeat/engine/training/": "engine",
    "defeat/engine/data/": "engine",
}
_HEADS = "detector: torchvision/"
MEASURED, ORDINARY = (StepInfo(step=step, steps=1000, epoch=0, epochs=1) for step in (100, 101))


def _place(frame: FrameType | None) -> str:
    """Return whose code runs in `frame`, its file and line: "method: defeat/engine/methods/cwd.py:40" or "detector: …".

    "backward" is torch's own part of a backward pass; "other" is neither a method's, a detector's nor the engine's.
    """
    while frame is not None:
        file = frame.f_code.co_filename
        for folder, whose in _PLACES.items():
            _, found, rest = file.rpartition("/" + folder)
            if found:
                return f"{whose}: {folder}{rest}:{frame.f_lineno}"
        # torch repeats here the warnings of its threads in a backward pass.
        if file.endswith("/torch/autograd/__init__.py"):
            return "backward"
        frame = frame.f_back
    return "other"


def waits(work: Callable[[], object], device: torch.device) -> Counter[str]:
    """Return how often `work` makes the CPU wait for the GPU, from torch's warnings, by owner and place of the code."""
    found: Counter[str] = Counter()

    def _seen(message: Warning | str, *_: object, **__: object) -> None:
        if _WAITS in str(message):
            found[_place(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _seen
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return found


def distillations(family: str) -> dict[str, dict[str, Any]]:
    """Return the `distillation` sections of every method that needs a teacher, for students of this family."""
    two_stage = family == "faster_rcnn"
    head: Mapping[str, Any] = {} if two_stage else NECK_ONLY
    found: dict[str, dict[str, Any]] = {
        name: {"method": name} for name, entry in METHODS.items() if entry.needs_teacher and name != "defeat"
    }
    for proposals in ("student", "teacher", "both") if two_stage else ("student",):
        found[f"defeat, {proposals}" if two_stage else "defeat"] = {
            "method": "defeat",
            "proposals": proposals,
            **head,
        }
    return found | {"defeat, auto": {"method": "defeat", "weights": "auto", **head}}


def _counted(step: Step, batch: Batch) -> tuple[Counter[str], Counter[str], bool]:
    """Return the waits of an ordinary step and of a measured one, and whether all losses are finite.

    The first step of each kind, which creates lasting constants and state, is not counted.
    """
    values: list[Mapping[str, float]] = []
    counts = []
    for step_info, measured in ((ORDINARY, False), (MEASURED, True)):

        def _take(step_info: StepInfo = step_info, measured: bool = measured) -> None:
            torch.manual_seed(0)
            values.append(step(batch, step_info, measured=measured).values)

        _take()
        counts.append(waits(_take, step.device))
    finite = all(math.isfinite(one) for taken in values for name, one in taken.items() if name.startswith("loss/"))
    return counts[0], counts[1], finite


def syncs(setting: Setting, family: str, precision: Precision) -> Found:
    """Count the waits of one step of each method, beyond those of the same student's step without a teacher.

    DeFeat's head part scores proposals with torchvision's heads, and the teacher's proposals come from torchvision's
    proposal network: waits in torchvision's own files are reported there, and miss no goal.
    """
    size = setting.sync_size.varied(precision=precision)
    case = Case(architecture=family, parameters={}, goal=0)
    student = build(case, size, size.student, setting.device)
    teacher = build(case, size, size.teacher, setting.device).eval().requires_grad_(False)
    batch = make_batch(size).to(setting.device)
    beyond: dict[str, Any] = {}
    with numerics(setting.device, precision, shapes=1):
        alone, alone_measured, finite = _counted(make_step(student, None, {"method": "baseline"}, size), batch)
        groups = [by_group(one) for one in (alone, alone_measured)]
        met = finite and all(one["engine"] == 1 and not one["other"] for one in groups)
        for name, distillation in distillations(family).items():
            try:
                ordinary, measured, finite = _counted(make_step(student, teacher, distillation, size), batch)
            except Exception as error:
                beyond[name], met = {"error": error_line(error)}, False
                continue
            more = [_beyond(ordinary, alone), _beyond(measured, alone_measured)]
            has_head = distillation["method"] == "defeat" and family == "faster_rcnn"
            met = met and finite and all(has_head and place.startswith(_HEADS) for one in more for place in one)
            if any(more) or not finite:
                beyond[name] = {"ordinary": more[0], "measured": more[1], "finite": finite}
    return Found(
        measured={"baseline": dict(groups[0]), "methods": len(distillations(family)), "beyond_baseline": beyond},
        goal="1 of the engine; 0 beyond the baseline, or for DeFeat's head part torchvision's own; finite losses",
        met=met,
    )


def by_group(found: Counter[str]) -> Counter[str]:
    """Return the counts by owner, without the places."""
    groups: Counter[str] = Counter()
    for place, count in found.items():
        groups[place.split(":")[0]] += count
    return groups


def _beyond(found: Counter[str], alone: Counter[str]) -> dict[str, int]:
    return {place: found[place] - alone[place] for place in found | alone if found[place] != alone[place]}


# ---- speed ----


def busy_seconds(work: Callable[[], None], device: torch.device, *, repeats: int) -> float:
    """Return how long the device computes or copies in one call of `work`, by torch's profiler.

    It is the length of the union of all kernels' and copies' intervals: overlapping kernels count once. On a CPU the
    operators replace the kernels, so that the same code runs.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            work()
        if on_gpu:
            torch.cuda.synchronize(device)
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    intervals = [
        (event.start_ns(), event.end_ns())
        for event in inner.kineto_results.events()
        # An annotation spans the gaps between its kernels.
        if event.device_type() == kind and not event.is_user_annotation()
    ]
    return union_length(intervals) / 1e9 / repeats


def union_length(intervals: Iterable[tuple[int, int]]) -> int:
    """Return the length of the union of the intervals."""
    covered, until = 0, -(2**63)
    for start, end in sorted(intervals):
        covered += max(0, end - max(start, until))
        until = max(until, end)
    return covered


def step_against_bound(setting: Setting, name: str) -> Found:
    """Compare a DeFeat step with its bound; return how long the GPU waits in it, and how much memory it takes.

    The share of waiting is 1 - busy / wall: busy by the profiler, wall as the median of steps without it, because the
    profiler slows the CPU down.
    """
    case = CASES[name]
    bench = Bench(case, setting.size, setting.device)
    found = compare(bench, case.goal, repeats=setting.size.repeats)
    wall = found["milliseconds"]["defeat"] / 1000
    with bench.numerics():
        busy = busy_seconds(bench.defeat, setting.device, repeats=3)
        memory = _memory(bench, setting)
    measured = {key: found[key] for key in ("ratio", "measuring", "milliseconds")} | {
        # None: the profiler recorded no kernel, as in a container without access to the driver's counters.
        "waiting_share": round(1 - busy / wall, 4) if busy else None,
        "busy_ms": round(1000 * busy, 1),
        "images_per_s": round(setting.size.images / wall, 2),
        "memory": memory,
    }
    return Found(measured=measured, goal={"ratio": case.goal}, met=found["ok"])


# What each variant changes of the GPU's own size, which is bfloat16 with channels_last.
_TF32, _HALF = ("tf32", "bfloat16, channels_last")
VARIANTS: dict[str, dict[str, Any]] = {
    _TF32: {"precision": "tf32", "channels_last": False},
    _HALF: {},
    "float32": {"precision": "float32", "channels_last": False},
    "bfloat16": {"channels_last": False},
    "bfloat16, channels_last, frozen batch norm": {"frozen_batch_norm": True},
    "float16, channels_last": {"precision": "float16"},
    "tf32, channels_last": {"precision": "tf32"},
}
NO_SEARCH = "bfloat16, channels_last, without cuDNN's search"


def speeds(setting: Setting) -> Found:
    """Time DeFeat's step with the student's proposals in every precision and layout: speed over tf32 and over float32.

    `cudnn_search` is the speed with cuDNN's search for the fastest algorithms of the one shape over that without.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, changes in VARIANTS.items():
        try:
            rows |= _variant(setting, name, changes)
        except Exception as error:
            rows[name] = {"error": error_line(error)}
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    ms = {name: row["ms"] for name, row in rows.items() if "ms" in row}

    def _over(fast: str, slow: str) -> float | None:
        return round(ms[slow] / ms[fast], 3) if fast in ms and slow in ms else None

    half = _over(_HALF, _TF32)
    measured = {
        "variants": rows,
        "half_over_tf32": half,
        "half_over_float32": _over(_HALF, "float32"),
        "cudnn_search": _over(_HALF, NO_SEARCH),
    }
    met = half is not None and half >= HALF_GOAL and len(ms) == len(rows)
    return Found(measured=measured, goal={"half_over_tf32": HALF_GOAL}, met=met)


def _variant(setting: Setting, name: str, changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    bench = Bench(CASES[STUDENTS], setting.size.varied(**changes), setting.device)
    repeats = max(1, setting.size.repeats // 2)
    with bench.numerics():
        rows = {name: _timed_step(bench, repeats)}
    if name == _HALF:
        with numerics(setting.device, bench.schedule.precision, shapes=None):
            rows[NO_SEARCH] = _timed_step(bench, repeats)
    return rows


def _timed_step(bench: Bench, repeats: int) -> dict[str, Any]:
    seconds = timed({"step": bench.defeat}, bench.device, repeats=repeats)["step"]
    return {"ms": round(1000 * seconds, 2), "images_per_s": round(len(bench.batch) / seconds, 2)}


def compiled(setting: Setting) -> Found:
    """Take compiled steps at several shapes: nothing must fall back, and further shapes must compile no new graph.

    `speed` is the time of the uncompiled step over that of the compiled one, at the first shape.
    """
    size = setting.compiled_size
    other = [(size.height, round(0.75 * size.width)), (size.width, size.height), (size.height, round(0.9 * size.width))]
    stats = torch._dynamo.utils.counters["stats"]
    plain = Bench(CASES["retinanet"], size, setting.device)
    with plain.numerics():
        eager = timed({"step": plain.defeat}, setting.device, repeats=3)["step"]
    del plain
    bench = Bench(CASES["retinanet"], size.varied(compile=True), setting.device)
    before = stats["unique_graphs"]
    with numerics(setting.device, bench.schedule.precision, shapes=None):
        bench.defeat()
        bench.measured()
        first = stats["unique_graphs"] - before
        for height, width in other:
            bench.ours(make_batch(replace(size, height=height, width=width)).to(setting.device), CLOCK)
        whole = stats["unique_graphs"] - before
    with bench.numerics():
        fast = timed({"step": bench.defeat}, setting.device, repeats=3)["step"]
    failures = {
        "student": bench.ours.losses.detector.compilation_failure,
        "teacher": bench.teacher.compilation_failure,
    }
    return Found(
        measured={
            "graphs_after_one_shape": first,
            "graphs_after_four": whole,
            "failures": failures,
            "speed": round(eager / fast, 3),
            "ms": round(1000 * fast, 2),
        },
        goal="no failure, as many graphs after four shapes as after one",
        met=whole == first > 0 and not any(failures.values()),
    )


# ---- memory ----


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _resident(step: Step, teacher: nn.Module | None) -> int:
    """Return the bytes that stay allocated between steps: weights, buffers, and the optimiser's state."""
    modules = [step.losses, *([teacher] if teacher is not None else [])]
    state = [one for kept in step.optimizer.state.values() for one in kept.values() if isinstance(one, Tensor)]
    return _bytes(state) + sum(_bytes([*one.parameters(), *one.buffers()]) for one in modules)


def kept_bytes(step: Step, teacher: nn.Module, batch: Batch) -> int:
    """Return the bytes of the distinct storages that autograd saves for a backward pass, without weights and batch."""
    own = [*step.losses.parameters(), *step.losses.buffers(), *teacher.parameters(), *teacher.buffers(), batch.storage]
    known = {one.untyped_storage().data_ptr() for one in own}
    kept: dict[int, Any] = {}

    def _pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(_pack, lambda tensor: tensor):
        losses, _ = step.losses(batch, CLOCK, False)
    del losses
    return sum(storage.nbytes() for storage in kept.values())


def _memory(bench: Bench, setting: Setting) -> dict[str, Any]:
    """Return the peak memory of DeFeat's step and a prediction, GB (10^9 bytes), without that of the bound's student.

    predicted = weights, buffers and optimiser's state + batch + gradients + kept(padded area). `kept` is what autograd
    saves for the backward pass, measured at a quarter and at half of the area and extrapolated linearly. It excludes
    the workspaces of kernels, the gradients of maps in the backward pass, and the pool's rounding: `ratio` shows their
    size.
    """
    size, step = setting.size, bench.ours
    areas, kept = [], []
    for factor in (0.5, math.sqrt(0.5)):
        smaller = replace(size, height=round(factor * size.height), width=round(factor * size.width))
        areas.append(_padded_area(smaller))
        kept.append(kept_bytes(step, bench.teacher, make_batch(smaller).to(setting.device)))
    slope = (kept[1] - kept[0]) / (areas[1] - areas[0])
    predicted_kept = kept[1] + slope * (_padded_area(size) - areas[1])
    resident = _resident(step, bench.teacher) + bench.batch.storage.nbytes
    gradients = _bytes(one for one in step.losses.parameters() if one.requires_grad)
    peak = resident + _peak(bench)
    predicted = resident + gradients + predicted_kept
    return {
        "peak_gb": round(peak / 1e9, 3),
        "predicted_gb": round(predicted / 1e9, 3),
        "ratio": round(peak / predicted, 3),
        "resident_gb": round(resident / 1e9, 3),
        "gradients_gb": round(gradients / 1e9, 3),
        "kept_gb": round(predicted_kept / 1e9, 3),
    }


def _padded_area(size: Size) -> int:
    """Return the pixels of an image in a batch: torchvision pads both sides to multiples of 32."""
    return math.prod(32 * math.ceil(side / 32) for side in (size.height, size.width))


def _peak(bench: Bench) -> int:
    """Return the peak bytes during DeFeat's step beyond what stays allocated between steps."""
    for step in (bench.ours, bench.plain):
        step.optimizer.zero_grad(set_to_none=True)
    if bench.device.type != "cuda":
        return peak_bytes(bench.defeat)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    bench.defeat()
    return torch.cuda.max_memory_allocated(bench.device) - before


def sync_parts() -> list[Part]:
    """Return the parts that count waits, one for each family and precision."""
    return [
        Part(
            name=f"syncs: {family}, {precision}",
            seconds=8,
            work=lambda setting, family=family, precision=precision: syncs(setting, family, precision),  # type: ignore[misc]
        )
        for precision in PRECISIONS
        for family in FAMILIES
    ]


def step_parts() -> list[Part]:
    """Return the parts that time a step against its bound, one for each case."""
    return [
        Part(name=f"step: {name}", seconds=30, work=lambda setting, name=name: step_against_bound(setting, name))  # type: ignore[misc]
        for name in CASES
    ]
