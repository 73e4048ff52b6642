"""A worker on a machine whose clock is wrong: `python -m tests.faults.skewed_worker SECONDS …`, else as `worker`."""

import runpy
import sys
import time
from datetime import timedelta

import app.db


def shift(seconds: float) -> None:
    """Let this process's wall clock be so many seconds ahead (behind, if negative). Monotonic clocks stay."""
    true_time, true_utcnow = time.time, app.db.utcnow
    time.time = lambda: true_time() + seconds
    # Before any other module takes it by its name.
    app.db.utcnow = lambda: true_utcnow() + timedelta(seconds=seconds)


if __name__ == "__main__":
    shift(float(sys.argv.pop(1)))
    runpy.run_module("worker", run_name="__main__", alter_sys=True)
