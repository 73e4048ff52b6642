"""The processor time of the worker itself while it supervises a run, against the run's.

    python -m benchmarks.supervisor [--quick]

Starts the embedded stack in a temporary directory, imports scenes of digits, and trains the example's job, a teacher
and a student (with --quick one epoch of the student alone). The worker's processes are those of the jobs' queue:
Celery's own, which also sweeps for lost work and is reported separately, and its pool's child, the supervisor. The
run's time is that of the processes that the child has reaped. Times are counted from just before the job is submitted
until it has ended.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.queue_latency import stack
from defeat.client.specs import load_spec
from examples import digits

GOAL: Final = 0.01
SPEC: Final = Path(digits.__file__).with_name("digits.yaml")


def worker_processes() -> tuple[psutil.Process, psutil.Process]:
    """Return the process of the stack's worker that takes jobs, and its pool's child."""
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "worker" in process.cmdline() and "jobs" in process.cmdline() and process.children()
    ]
    (worker,) = workers
    (child,) = worker.children()
    return worker, child


def _used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    parser = argparse.ArgumentParser(description="The supervisor's processor time against its run's.")
    parser.add_argument("--quick", action="store_true", help="one epoch of the student alone")
    quick = parser.parse_args(arguments).quick
    with tempfile.TemporaryDirectory(prefix="sv") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        with stack(Path(folder) / "home", data) as client:
            dataset = client.datasets.wait(client.datasets.add(digits.build(data, val_scenes=20))["id"])
            spec = load_spec(SPEC, [f"dataset={dataset['id']}"])
            if quick:
                spec |= {"teacher": None, "distillation": {"method": "baseline"}}
                spec["schedule"] = spec["schedule"] | {"epochs": 1}
            worker, child = worker_processes()
            before = _used_s(worker), _used_s(child), child.cpu_times()
            start = time.perf_counter()
            job = client.jobs.wait(client.jobs.submit(spec)["id"])
            wall_s = time.perf_counter() - start
            after = _used_s(worker), _used_s(child), child.cpu_times()
    if job["status"] != "succeeded":
        raise RuntimeError(f"the job {job['status']}: {job['failure']}")
    run_s = sum(getattr(after[2], name) - getattr(before[2], name) for name in ("children_user", "children_system"))
    supervisor_s, celery_s = after[1] - before[1], after[0] - before[0]
    ratio = supervisor_s / run_s
    result = {
        "benchmark": "supervisor",
        "ratio": round(ratio, 5),
        "goal": GOAL,
        "ok": bool(ratio < GOAL),
        "run_s": round(run_s, 1),
        "supervisor_s": round(supervisor_s, 2),
        "celery_s": round(celery_s, 2),
        "wall_s": round(wall_s, 1),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
