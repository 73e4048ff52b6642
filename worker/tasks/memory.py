"""How a job can need less memory: it processes its batches in smaller parts, one after the other.

The optimiser still sees the whole batch, as the mean over its parts. A mean over images does not change. A loss that is
divided by a number of objects, cells or proposals is divided by the number of each part, and trained batch norm uses
the statistics of each part; results then differ as they do between batch sizes.
"""

from collections.abc import Mapping
from typing import Any

Spec = Mapping[str, Any]

_SCHEDULES: dict[str, tuple[str, ...]] = {"teacher": ("teacher", "schedule"), "distillation": ("schedule",)}


def adjusted(spec: Spec, adjustments: Spec | None) -> dict[str, Any]:
    """Return the spec with the adjusted values instead of its own."""
    merged = dict(spec)
    for key, value in (adjustments or {}).items():
        merged[key] = adjusted(merged[key], value) if isinstance(value, Mapping) else value
    return merged


def reduced(spec: Spec, phase: str | None) -> dict[str, Any] | None:
    """Return the adjustments with which the phase that exhausted the memory needs about half as much.

    None if the phase does not depend on a batch's size, or already processes one image at a time.
    """
    if phase == "evaluation":
        size = spec["evaluation"]["batch_size"]
        return {"evaluation": {"batch_size": size // 2}} if size > 1 else None
    path = _SCHEDULES.get(phase or "")
    if path is None:
        return None
    choices = _accumulations(spec, path)
    return _nested((*path, "accumulation"), choices[0]) if choices else None


def describe(adjustments: Spec) -> str:
    """Write adjustments as a spec's keys: `schedule.accumulation 2`."""
    return ", ".join(f"{key} {value}" for key, value in _flat(adjustments))


def advice(spec: Spec, phase: str | None) -> str:
    """Return what to change in the spec after this phase exhausted the memory."""
    smaller = "lower the detectors' min_size and max_size, or use smaller detectors"
    if phase == "evaluation":
        size = spec["evaluation"]["batch_size"]
        fits = f"set evaluation.batch_size below {size}, or " if size > 1 else ""
        return f"this happened in evaluation: {fits}{smaller}"
    path = _SCHEDULES.get(phase or "")
    if path is None:
        return smaller
    whose, where = ("teacher" if path[0] == "teacher" else "student"), ".".join(path)
    choices = _accumulations(spec, path)
    if not choices:
        return f"this happened in the training of the {whose}, with one image at a time: {smaller}"
    listed = ", ".join(map(str, choices))
    return f"this happened in the training of the {whose}: set {where}.accumulation to one of {listed}, or {smaller}"


def _accumulations(spec: Spec, path: tuple[str, ...]) -> list[int]:
    """Return the values of `accumulation` that at least halve what each GPU holds: divisors of its share of a batch."""
    schedule: Any = spec
    for key in path:
        schedule = schedule[key]
    share = schedule["batch_size"] // spec["resources"]["gpus"]
    return [parts for parts in range(2 * schedule["accumulation"], share + 1) if share % parts == 0]


def _nested(path: tuple[str, ...], value: int) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def _flat(adjustments: Spec) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in adjustments.items():
        inner = _flat(value) if isinstance(value, Mapping) else [("", value)]
        found.extend((f"{key}.{name}" if name else key, one) for name, one in inner)
    return found
