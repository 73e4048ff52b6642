"""All measurements that need a GPU, in one program of eight minutes.

    python -m benchmarks.gpu [--minutes 8] [--parts loader syncs …] [--device cuda] [--quick]

It prints one JSON line for each part as soon as it is measured, the most informative parts first, so that an
interrupted run has printed the most important results: `part`, `ok` (null without a goal), `measured`, `goal`,
`seconds`; `error` if the part failed, which does not end the others; `skipped` if it would not have fitted into the
time, or has nothing to measure here. The first line names the card, its driver and torch. The last line is one JSON
summary; the exit code is 1 if a goal is missed or a part failed.

`--device cpu`, or `--quick`, is the rehearsal: every part at tiny sizes through the same code, on one thread,
with `ok` and `goal` null.
"""

import argparse
import gc
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu_loader_runs import data_wait, loading
from benchmarks.gpu_runs import digits_run, kernel, killed_run, ranks_run
from benchmarks.gpu_setups import Deadline, Found, Part, Setting, Skipped, error_line
from benchmarks.gpu_step_runs import compiled, speeds, step_parts, sync_parts

RESERVE_S = 5.0  # for the summary and for ending what runs

Print = Callable[[Mapping[str, Any]], None]


def parts() -> list[Part]:
    """Return all parts, in order of information per minute."""
    return [
        Part(name="loader", seconds=20, work=loading),
        *sync_parts(),
        *step_parts(),
        Part(name="digits", seconds=60, work=digits_run),
        Part(name="killed", seconds=60, work=killed_run),
        Part(name="speeds", seconds=60, work=speeds),
        Part(name="wait", seconds=40, work=data_wait),
        Part(name="kernel", seconds=20, work=kernel),
        Part(name="ranks", seconds=60, work=ranks_run),
        Part(name="compile", seconds=100, work=compiled),
    ]


class OutOfTime(BaseException):
    """The program's time was over while a part was running. A `BaseException`, so that no part catches it."""


@contextmanager
def _ended_by(deadline: Deadline) -> Iterator[None]:
    """Raise `OutOfTime` in this thread when the time is over."""

    def _over(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime("the program's time is over")

    before = signal.signal(signal.SIGALRM, _over)
    signal.setitimer(signal.ITIMER_REAL, max(deadline.left - RESERVE_S, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def carry_out(part: Part, setting: Setting) -> dict[str, Any]:
    """Carry out one part and return its line, also if it fails or is skipped."""
    line: dict[str, Any] = {"part": part.name, "ok": None}
    # The estimates are those of a GPU at full size.
    needed = part.seconds if setting.judged else 0.0
    if setting.deadline.left - RESERVE_S <= needed:
        return line | {"skipped": f"{setting.deadline.left:.0f} s are left, and it takes about {part.seconds:.0f}"}
    begun = time.monotonic()
    try:
        with _ended_by(setting.deadline):
            found = part.work(setting)
    except Skipped as reason:
        line |= {"skipped": str(reason)}
    except (Exception, OutOfTime) as error:
        line |= {"ok": False, "error": error_line(error)}
    else:
        line |= _judged(found) if setting.judged else {"measured": found.measured, "goal": None}
    line["seconds"] = round(time.monotonic() - begun, 1)
    # The memory of a failed part must not fail the next one.
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return line


def _judged(found: Found) -> dict[str, Any]:
    return {"ok": found.met, "measured": found.measured, "goal": found.goal}


def summary(lines: Sequence[Mapping[str, Any]], setting: Setting) -> dict[str, Any]:
    """Return the last line: which parts missed their goal, failed or were skipped."""
    failed = [line["part"] for line in lines if "error" in line]
    missed = [line["part"] for line in lines if line["ok"] is False and "error" not in line]
    return {
        "benchmark": "gpu",
        "ok": not failed and not missed,
        "parts": len(lines),
        "passed": sum(line["ok"] is True for line in lines),
        "missed": missed,
        "failed": failed,
        "skipped": [line["part"] for line in lines if "skipped" in line],
        "device": setting.device.type,
        "rehearsal": not setting.judged,
        "seconds": round(setting.deadline.spent, 1),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return the line about the machine: card, driver, and versions."""
    known: dict[str, Any] = {
        "part": "machine",
        "ok": None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type != "cuda":
        return known | {"device": f"cpu, {torch.get_num_threads()} threads"}
    properties = torch.cuda.get_device_properties(device)
    return known | {
        "device": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "devices": torch.cuda.device_count(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] or None


def run(chosen: Sequence[Part], setting: Setting, say: Print) -> dict[str, Any]:
    """Carry out the parts in order, and return the summary; `say` is given each line as soon as there is one."""
    lines = []
    for part in chosen:
        lines.append(carry_out(part, setting))
        say(lines[-1])
    return summary(lines, setting)


def _say(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(arguments: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    every = parts()
    groups = list(dict.fromkeys(part.group for part in every))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the program's time, imports included (default: 8)")
    parser.add_argument("--parts", nargs="+", choices=groups, default=groups, help="only these parts")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on any device: a rehearsal")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # a second thread does not speed up tiny tensors, and delays them on a busy machine
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        setting = Setting(
            device=device,
            small=given.quick or device.type == "cpu",
            home=Path(directory),
            deadline=Deadline(given.minutes),
        )
        _say(machine(device))
        result = run([part for part in every if part.group in given.parts], setting, _say)
    _say(result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
