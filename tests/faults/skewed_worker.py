"""A worker with a wrong clock: `python -m tests.faults.skewed_worker SECONDS`, then the arguments of `worker`."""

import runpy
import sys
import time
from datetime import timedelta

import app.db


def shift(seconds: float) -> None:
    """Set this process's wall clock ahead by this many seconds, or back if negative; monotonic clocks do not change."""
    true_time, true_utcnow = time.time, app.db.utcnow
    time.time = lambda: true_time() + seconds
    # Before another module imports the function by name.
    app.db.utcnow = lambda: true_utcnow() + timedelta(seconds=seconds)


if __name__ == "__main__":
    shift(float(sys.argv.pop(1)))
    runpy.run_module("worker", run_name="__main__", alter_sys=True)
