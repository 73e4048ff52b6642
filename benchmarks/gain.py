"""The gain of distillation over training alone: trains the same student with each method, on several seeds.

    python -m benchmarks.gain --out DIR [--data digits|bccd] [--detector faster_rcnn|retinanet] [--methods …]
                              [--seeds 0 1 2]
    python -m benchmarks.gain --quick

A method is a name from `gain_setups.methods`, or NAME=JSON with a `distillation` section of a job's spec:
`--methods baseline 'mine={"method": "defeat", "neck_object_weight": 1}'`. Every run is a real one, in its own directory
in DIR; a finished run is not repeated. `--quick` takes under a minute, needs no DIR, and only shows that every part
runs. The last line is one JSON object; the exit code is 0 if it says `ok`.
The goal applies to the first method after the baseline: the difference of its mean to the baseline's must exceed both
spreads, from the lowest seed to the highest. `ratio` is the difference over the larger spread.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.gain_runs import RunFailed, prepare_data, train_student, train_teacher
from benchmarks.gain_setups import Architecture, Data, Spec, methods, quick, setup

GOAL = 1.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """AP of one method over the seeds, 0 to 1; `deviation` is the sample's standard deviation, 0 for one seed."""

    mean: float
    lowest: float
    highest: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Return the summary of one value or more."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean=statistics.fmean(values), lowest=min(values), highest=max(values), deviation=deviation)

    @property
    def spread(self) -> float:
        """The difference of the highest and the lowest value."""
        return self.highest - self.lowest


def recovered(method: Summary, baseline: Summary, teacher: float) -> float | None:
    """Return the share of the gap between the baseline's mean and the teacher that a method closes; None: no gap."""
    gap = teacher - baseline.mean
    return (method.mean - baseline.mean) / gap if gap > 0 else None


def gain_over_spread(method: Summary, baseline: Summary) -> float | None:
    """Return the difference of a method's mean to the baseline's over the larger spread; None for a spread of 0."""
    spread = max(method.spread, baseline.spread)
    return (method.mean - baseline.mean) / spread if spread > 0 else None


def table(teacher: float, summaries: dict[str, Summary]) -> str:
    """Return the summaries as a Markdown table, the teacher last."""
    baseline = summaries["baseline"]
    lines = ["| | AP, mean | lowest to highest | standard deviation | of the gap |", "|---|---|---|---|---|"]
    for name, one in summaries.items():
        share = None if name == "baseline" else recovered(one, baseline, teacher)
        shown = "" if share is None else f"{share:.0%}"
        lines.append(
            f"| {name} | {one.mean:.3f} | {one.lowest:.3f} to {one.highest:.3f} | {one.deviation:.3f} | {shown} |"
        )
    return "\n".join([*lines, f"| teacher | {teacher:.3f} | | | |"])


def _choose(asked: Sequence[str], known: dict[str, Spec]) -> dict[str, Spec]:
    """Return the methods asked for, the baseline first whether or not it was. Raises `ValueError` for a bad one."""
    chosen: dict[str, Spec] = {"baseline": known["baseline"]}
    for one in asked:
        name, given, section = one.partition("=")
        if not given and name not in known:
            raise ValueError(f"no method {name!r}; known: {', '.join(known)}, or NAME=JSON")
        if given and (name in known or not name.isidentifier()):
            raise ValueError(f"{name!r} cannot name a method of your own: take a new name of letters, digits and _")
        chosen[name] = json.loads(section) if given else known[name]
    return chosen


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Carry out whatever is not there yet in `directory`, print the table, and return the result's JSON object."""
    full = setup(options.data, options.detector)
    trained = quick(full) if options.quick else full
    chosen = _choose(options.methods, methods(trained))
    seeds = options.seeds[:1] if options.quick else options.seeds
    out = directory.resolve() / f"{options.data}{'-quick' if options.quick else ''}"
    whole, part = prepare_data(out, options.data, student_images=trained.student_images, tiny=options.quick)
    runs = out / options.detector
    weights, teacher = train_teacher(runs, trained, whole)
    found: dict[str, list[float]] = {name: [] for name in chosen}
    # Seed by seed: what is interrupted has all methods on the first seeds, not the first methods on all seeds.
    for seed in seeds:
        for name, method in chosen.items():
            metrics = train_student(runs, trained, part, weights, name=name, method=method, seed=seed)
            found[name].append(metrics["ap"])
    summaries = {name: Summary.of(values) for name, values in found.items()}
    print(f"\n{options.data}, {options.detector}, seeds {seeds}\n{table(teacher, summaries)}\n")
    return {
        "benchmark": "gain",
        "data": options.data,
        "detector": options.detector,
        "quick": options.quick,
        "seeds": seeds,
        "teacher": teacher,
        "methods": {
            name: asdict(one) | {"recovered": recovered(one, summaries["baseline"], teacher), "values": found[name]}
            for name, one in summaries.items()
        },
        **_verdict(summaries, proves_something=not options.quick),
    }


def _verdict(summaries: dict[str, Summary], *, proves_something: bool) -> dict[str, Any]:
    judged = next((name for name in summaries if name != "baseline"), None)
    if not proves_something or judged is None:
        print("This run only tests the program: it says nothing about the methods.")
        return {"judged": None, "ratio": None, "goal": None, "ok": True}
    ratio = gain_over_spread(summaries[judged], summaries["baseline"])
    return {"judged": judged, "ratio": ratio, "goal": GOAL, "ok": ratio is not None and ratio > GOAL}


def main(arguments: list[str] | None = None) -> int:
    """Measure as the command line says; return 0 for ok, 1 for a missed goal, 2 for a usage error or a failed run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gain", description="The gain of distillation over training alone."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the runs; optional with --quick")
    parser.add_argument("--data", choices=get_args(Data), default="digits", help="(default: %(default)s)")
    parser.add_argument("--detector", choices=get_args(Architecture), default="faster_rcnn")
    parser.add_argument("--methods", nargs="+", default=["defeat_auto", "defeat"], help="names, or NAME=JSON")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="tiny runs, under a minute: only a test of the program")
    options = parser.parse_args(arguments)
    if options.out is None and not options.quick:
        parser.error("--out DIR is needed: the runs take minutes each, and are kept there")
    try:
        with tempfile.TemporaryDirectory() as directory:
            result = measure(options, options.out or Path(directory))
    except (RunFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
